"""Write a hash of each document of a filtered shard."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.log import argument_parser, logger, run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--filtered", type=Path, required=True, help="CORPUS/SHARD.parquet of filter_shard")
    parser.add_argument("--output", type=Path, required=True, help="CORPUS/SHARD.sig to write")
    parser.add_argument("--record", type=Path, required=True, help="lineage record, written last")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.data.curation.exact import exact_signature

    record = exact_signature(args.filtered, output=args.output, record=args.record)
    documents = record.counts["documents"]
    logger.info("%s: %d documents; %.1f s", record.name, documents, record.seconds)
    return 0


if __name__ == "__main__":
    run(main)
