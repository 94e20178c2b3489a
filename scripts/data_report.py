"""Report on the data of a run, from its lineage records: text, a page and figures."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.log import argument_parser, logger, run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--records",
        type=Path,
        nargs="+",
        required=True,
        help="records of the blends and indices; those of what they were made from are found through them",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="directory of report.md, report.html, *.svg"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.report.data_report import write

    data = write(args.records, args.output)
    logger.info(
        "%s: %d corpora, %d chat sources, %d records",
        args.output / "report.md",
        len(data.texts),
        len(data.chats),
        sum(map(len, data.seconds.values())),
    )
    return 0


if __name__ == "__main__":
    run(main)
