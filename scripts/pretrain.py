"""Train one pretraining phase, from random weights or from the end of the phase before it."""

from pathlib import Path

from snaketron.log import run
from snaketron.train.stage import Stage, argument_parser, run_stage


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--index", type=Path, required=True, help="directory that index_pretrain made")
    args = parser.parse_args(argv)
    stage = Stage(args)

    def make_batches(stage: Stage):
        from snaketron.train.batches import PretrainBatches

        return PretrainBatches(
            stage.blend,
            stage.settings,
            stage.tokenizer,
            index=args.index,
            micro_batch_size=stage.run.micro_batch_size,
            eval_samples=stage.run.eval_samples,
        )

    return run_stage(stage, lambda: stage.train(make_batches, with_optimizer=True))


if __name__ == "__main__":
    run(main)
