"""Train one pretraining phase, from random weights, a checkpoint, or the end of the phase before it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from snaketron.log import run
from snaketron.train.stage import Stage, has_optimizer, run_stage, training_parser

if TYPE_CHECKING:
    from snaketron.train.batches import PretrainBatches


def main(argv: list[str] | None = None) -> int:
    parser = training_parser(__doc__)
    parser.add_argument("--index", type=Path, required=True, help="directory that index_pretrain made")
    args = parser.parse_args(argv)

    def make_batches(stage: Stage) -> PretrainBatches:
        from snaketron.train.batches import PretrainBatches

        return PretrainBatches(
            stage.blend,
            stage.settings,
            stage.tokenizer,
            index=args.index,
            micro_batch_size=stage.run.micro_batch_size,
            eval_samples=stage.run.eval_samples,
        )

    def train(stage: Stage) -> int:
        # The first phase of a curriculum takes the weights of its base alone, if it has one.
        goes_on = stage.settings.schedule.start > 0 and has_optimizer(stage.base)
        return stage.train(make_batches, optimizer_of_base=goes_on)

    return run_stage(args, train)


if __name__ == "__main__":
    run(main)
