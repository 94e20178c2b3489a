"""Import a checkpoint that trainings begin with: published safetensors, or Megatron's torch_dist."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.log import argument_parser, run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--source", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--stage", required=True, help="its name below <ckpt>: base/... or pretrain/...")
    parser.add_argument("--model", required=True, help="JSON of the section `model` that it must agree with")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer directory of the trainings")
    parser.add_argument("--seq-length", type=int, required=True, help="tokens that answers of it may have")
    parser.add_argument("--output", type=Path, required=True, help="link to make: <ckpt>/<stage>")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.config import Model
    from snaketron.inference.importing import import_base
    from snaketron.settings import read_settings

    import_base(
        args.source,
        args.output,
        stage=args.stage,
        model=read_settings(Model, args.model, "--model"),
        tokenizer=args.tokenizer,
        seq_length=args.seq_length,
    )
    return 0


if __name__ == "__main__":
    run(main)
