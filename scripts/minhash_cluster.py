"""Find the documents of a group of corpora that nearly repeat another; the first of each cluster stays."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.log import argument_parser, logger, run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--pairs", type=Path, nargs="+", required=True, help=".dups of all buckets, in order")
    parser.add_argument(
        "--signatures",
        type=Path,
        nargs="+",
        required=True,
        help="signatures of the shards that the pairs come from, in the order of minhash_buckets",
    )
    parser.add_argument("--settings", required=True, help="MinHash as JSON")
    parser.add_argument("--output", type=Path, required=True, help="GROUP.parquet to write")
    parser.add_argument("--record", type=Path, required=True, help="lineage record, written last")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.config import MinHash
    from snaketron.data.curation.minhash import minhash_cluster
    from snaketron.settings import read_settings

    record = minhash_cluster(
        args.pairs,
        signatures=args.signatures,
        settings=read_settings(MinHash, args.settings),
        output=args.output,
        record=args.record,
    )
    counts = record.counts
    logger.info(
        "group %s: %d documents nearly repeat others %s; %.1f s",
        record.name,
        counts["removed"]["documents"],
        counts["removed_by_corpus"],
        record.seconds,
    )
    return 0


if __name__ == "__main__":
    run(main)
