"""Write conversations about the standard library, or with requests that call tools."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.log import argument_parser, logger, run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--source", choices=("questions", "tools"), required=True)
    parser.add_argument("--chats", type=Path, nargs="+", required=True, help="JSON lines files to write")
    parser.add_argument("--record", type=Path, required=True, help="lineage record, written last")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.data.sample import chats, text

    record = text.write(args.source, chats.SOURCES[args.source](), args.chats, args.record)
    counts = record.counts
    logger.info(
        "%s: %d conversations, %d bytes; %.1f s",
        args.source,
        counts["rows"],
        counts["bytes"],
        record.seconds,
    )
    return 0


if __name__ == "__main__":
    run(main)
