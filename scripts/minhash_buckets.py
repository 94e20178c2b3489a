"""Find the pairs of documents of a group of corpora that agree in one bucket of their signatures."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.log import argument_parser, logger, run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--signatures", type=Path, nargs="+", required=True, help="CORPUS/SHARD.sig of all shards, in order"
    )
    parser.add_argument(
        "--removals", type=Path, nargs="*", default=[], help="exact duplicates, which are left out"
    )
    parser.add_argument("--bucket", type=int, required=True, help="number of the bucket, from 0")
    parser.add_argument("--settings", required=True, help="MinHash as JSON")
    parser.add_argument("--output", type=Path, required=True, help="GROUP/BUCKET.dups to write")
    parser.add_argument("--record", type=Path, required=True, help="lineage record, written last")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.config import MinHash
    from snaketron.data.curation.minhash import minhash_buckets
    from snaketron.settings import read_settings

    record = minhash_buckets(
        args.signatures,
        removals=args.removals,
        bucket=args.bucket,
        settings=read_settings(MinHash, args.settings),
        output=args.output,
        record=args.record,
    )
    logger.info("%s: %d pairs; %.1f s", record.name, record.counts["pairs"], record.seconds)
    return 0


if __name__ == "__main__":
    run(main)
