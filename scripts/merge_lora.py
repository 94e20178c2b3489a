"""Add trained adapters to the weights of their base: the output is like a fully fine-tuned checkpoint."""

from __future__ import annotations

from pathlib import Path

import sft
from snaketron.log import run
from snaketron.settings.training import LoraSettings
from snaketron.train.merge import merge
from snaketron.train.stage import Stage, argument_parser, run_stage


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--adapters", type=Path, required=True, help="checkpoint that lora.py made")
    args = parser.parse_args(argv)
    stage = Stage(args, LoraSettings)
    return run_stage(stage, lambda: merge(stage, args.adapters, sft.make_batches))


if __name__ == "__main__":
    run(main)
