"""Average the checkpoints of a phase from before its learning rate falls: what a decay would have given."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.log import argument_parser, run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="such as ckpt/pretrain/broad")
    parser.add_argument("--stage", required=True, help="name of the average below <ckpt>: merged/...")
    parser.add_argument(
        "--tokens", type=int, required=True, help="tokens that it averages over; 0: all that is kept"
    )
    parser.add_argument("--output", type=Path, required=True, help="link to make: <ckpt>/<stage>")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.train.averaging import average

    average(args.checkpoint, args.output, stage=args.stage, tokens=args.tokens or None)
    return 0


if __name__ == "__main__":
    run(main)
