"""Write a corpus or a source of conversations of the sample, from what ships with Python or is made up."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.log import argument_parser, logger, run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    names = ("docs", "code", "packages", "requests", "questions", "tools")
    parser.add_argument("--name", choices=names, required=True)
    parser.add_argument("--files", type=Path, nargs="+", required=True, help="JSON lines files to write")
    parser.add_argument("--record", type=Path, required=True, help="lineage record, written last")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.data.sample import chats, text

    rows = (text.CORPORA | chats.SOURCES)[args.name]()
    record = text.write(args.name, rows, args.files, args.record)
    counts = record.counts
    logger.info("%s: %d rows, %d bytes; %.1f s", args.name, counts["rows"], counts["bytes"], record.seconds)
    return 0


if __name__ == "__main__":
    run(main)
