"""Find the documents whose text an earlier document of the group has; the first of equal ones stays."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.log import argument_parser, logger, run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--signatures", type=Path, nargs="+", required=True, help="CORPUS/SHARD.sig of all shards, in order"
    )
    parser.add_argument("--output", type=Path, required=True, help="GROUP.parquet to write")
    parser.add_argument("--record", type=Path, required=True, help="lineage record, written last")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.data.curation.exact import exact_find

    record = exact_find(args.signatures, output=args.output, record=args.record)
    counts = record.counts
    logger.info(
        "group %s: %d of %d documents are exact duplicates %s; %.1f s",
        record.name,
        counts["removed"]["documents"],
        counts["documents"],
        counts["removed_by_corpus"],
        record.seconds,
    )
    return 0


if __name__ == "__main__":
    run(main)
