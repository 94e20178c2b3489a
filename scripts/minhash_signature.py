"""Write the MinHash signature of each document of a filtered shard."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.log import argument_parser, logger, run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--filtered", type=Path, required=True, help="CORPUS/SHARD.parquet of filter_shard")
    parser.add_argument("--settings", required=True, help="MinHash as JSON")
    parser.add_argument("--output", type=Path, required=True, help="CORPUS/SHARD.sig to write")
    parser.add_argument("--record", type=Path, required=True, help="lineage record, written last")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.config import MinHash
    from snaketron.data.curation.minhash import minhash_signature
    from snaketron.settings import read_settings

    settings = read_settings(MinHash, args.settings)
    record = minhash_signature(args.filtered, settings=settings, output=args.output, record=args.record)
    counts = record.counts
    logger.info(
        "%s: %d documents, %d of them too short to compare; %.1f s",
        record.name,
        counts["documents"],
        counts["too_short"],
        record.seconds,
    )
    return 0


if __name__ == "__main__":
    run(main)
