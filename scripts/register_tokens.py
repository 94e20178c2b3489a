"""Verify a .bin/.idx pair that was made elsewhere, and record it; nothing is copied."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.log import argument_parser, logger, run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--pair",
        type=Path,
        nargs=2,
        required=True,
        metavar=("PREFIX.bin", "PREFIX.idx"),
        help="both files of the pair",
    )
    parser.add_argument("--settings", required=True, help="RegisterSettings as JSON")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory of the tokenizer")
    parser.add_argument("--record", type=Path, required=True, help="lineage record to write")
    args = parser.parse_args(argv)
    if [path.suffix for path in args.pair] != [".bin", ".idx"] or len(
        {p.with_suffix("") for p in args.pair}
    ) > 1:
        parser.error("--pair: give PREFIX.bin and PREFIX.idx of one prefix")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.data.text.register import register_tokens
    from snaketron.settings import read_settings
    from snaketron.settings.registering import RegisterSettings

    settings = read_settings(RegisterSettings, args.settings)
    prefix = args.pair[0].with_suffix("")
    record = register_tokens(prefix, settings=settings, tokenizer=args.tokenizer, record=args.record)
    counts = record.counts[settings.split]
    logger.info(
        "%s: %d documents and %d tokens of %s, largest id %d",
        prefix,
        *(counts["documents"], counts["tokens"], settings.split, record.counts["largest_id"]),
    )
    return 0


if __name__ == "__main__":
    run(main)
