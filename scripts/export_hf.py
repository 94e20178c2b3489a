"""Write a checkpoint as transformers, vLLM and PEFT read it: safetensors, configuration, tokenizer, card."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.log import argument_parser, run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="such as ckpt/sft")
    parser.add_argument("--output", type=Path, required=True, help="directory to make, such as hf/sft")
    parser.add_argument("--base", help="exported model that adapters belong to, as transformers loads it")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.inference.exporting import export_checkpoint

    export_checkpoint(args.checkpoint, args.output, args.base)
    return 0


if __name__ == "__main__":
    run(main)
