"""A tuning as a program: a training on packed conversations, with answers on the way and a summary last.

It is here and not in train/, which knows nothing of answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from snaketron.files import write_text
from snaketron.jobs.launch import is_rank
from snaketron.jobs.version import Version
from snaketron.log import tell
from snaketron.report.summary import summarize
from snaketron.settings.training import TrainSettings
from snaketron.train.stage import Stage, run_stage, training_parser

if TYPE_CHECKING:  # they import megatron-core (5 s), which a finished version does not need
    from snaketron.model.build import BuiltModel
    from snaketron.train.sft_batches import SftBatches


def tune(description: str | None, argv: list[str] | None, kind: type[TrainSettings]) -> int:
    """Tune as the command line says, with settings of one `kind`, and print the summary; the exit status."""
    args = training_parser(description).parse_args(argv)
    status = run_stage(args, train, kind)
    if status == 0 and not is_rank():
        summary = summarize(args.output)
        write_text(Version(args.output).summary, summary)
        tell(summary)
    return status


def make_batches(stage: Stage) -> SftBatches:
    from snaketron.train.sft_batches import SftBatches

    return SftBatches.load(stage.blend, stage.settings, stage.tokenizer, eval_samples=stage.run.eval_samples)


def train(stage: Stage) -> int:
    from snaketron.inference.answers import write_answers

    def answer(built: BuiltModel, iteration: int, batches: SftBatches) -> None:
        write_answers(stage, built, iteration, batches)

    def batches_of_training(stage: Stage) -> SftBatches:
        batches = make_batches(stage)
        batches.report(stage.run.eval_samples)
        return batches

    return stage.train(batches_of_training, optimizer_of_base=False, answer=answer)
