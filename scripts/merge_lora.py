"""Add trained adapters to the weights of their base: the output is like a fully fine-tuned checkpoint."""

from __future__ import annotations

from pathlib import Path

from snaketron.inference.tuning import make_batches
from snaketron.log import run
from snaketron.settings.training import LoraSettings
from snaketron.train.merge import merge
from snaketron.train.stage import run_stage, training_parser


def main(argv: list[str] | None = None) -> int:
    parser = training_parser(__doc__)
    parser.add_argument("--adapters", type=Path, required=True, help="checkpoint that lora.py made")
    args = parser.parse_args(argv)
    return run_stage(
        args, lambda stage: merge(stage, args.adapters, make_batches), LoraSettings, has_steps=False
    )


if __name__ == "__main__":
    run(main)
