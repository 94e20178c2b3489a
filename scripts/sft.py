"""Tune a pretrained checkpoint on packed conversations, and write the summary of all stages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from snaketron.files import write_text
from snaketron.jobs.launch import is_rank
from snaketron.log import run
from snaketron.report.run import summarize
from snaketron.settings.training import TrainSettings
from snaketron.train.stage import Stage, parse_args, run_stage

if TYPE_CHECKING:
    from snaketron.train.build import BuiltModel
    from snaketron.train.sft_batches import SftBatches


def main(
    argv: list[str] | None = None,
    description: str | None = __doc__,
    kind: type[TrainSettings] = TrainSettings,
) -> int:
    stage = Stage(parse_args(description, argv), kind)
    status = run_stage(stage, lambda: train(stage))
    if status == 0 and not is_rank():
        summary = summarize(stage.output)
        write_text(stage.output / "summary.md", summary)
        print(summary)
    return status


def make_batches(stage: Stage) -> SftBatches:
    from snaketron.train.sft_batches import SftBatches

    return SftBatches.load(stage.blend, stage.settings, stage.tokenizer, eval_samples=stage.run.eval_samples)


def train(stage: Stage) -> int:
    from snaketron.inference.answers import write_answers

    def sample(built: BuiltModel, iteration: int, batches: SftBatches) -> None:
        write_answers(stage, built, iteration, batches)

    return stage.train(make_batches, with_optimizer=False, sample=sample)


if __name__ == "__main__":
    run(main)
