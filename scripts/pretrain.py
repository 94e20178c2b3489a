"""Train one pretraining phase, from random weights or from the end of the phase before it."""

from snaketron.log import run
from snaketron.train.stage import Stage, exit_status, parse_args


def main(argv: list[str] | None = None) -> int:
    stage = Stage(parse_args(__doc__, argv))

    def make_batches(stage: Stage):
        from snaketron.train.batches import PretrainBatches

        return PretrainBatches(
            stage.blend,
            stage.settings,
            stage.tokenizer,
            micro_batch_size=stage.run.micro_batch_size,
            eval_samples=stage.run.eval_samples,
            index_cache=stage.directory / "index_cache",
        )

    return exit_status(stage, lambda: stage.train(make_batches, with_optimizer=True))


if __name__ == "__main__":
    run(main)
