"""Remove duplicates and contaminated documents from a filtered shard, and replace personal addresses."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.log import argument_parser, logger, run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--filtered", type=Path, required=True, help="CORPUS/SHARD.parquet of filter_shard")
    parser.add_argument("--exact", type=Path, nargs="?", help="exact duplicates of its group")
    parser.add_argument("--near", type=Path, nargs="?", help="near-duplicates of its group")
    parser.add_argument("--index", type=Path, nargs="?", help="index.parquet of decontamination_index")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="directory of the tokenizer that counts tokens"
    )
    parser.add_argument("--settings", required=True, help="CurateSettings as JSON")
    parser.add_argument(
        "--num-examples", type=int, default=3, help="removed documents to list for each reason"
    )
    parser.add_argument("--output", type=Path, required=True, help="CORPUS/SHARD.parquet to write")
    parser.add_argument("--record", type=Path, required=True, help="lineage record, written last")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.data.curation.curate import curate_shard
    from snaketron.data.curation.documents import describe
    from snaketron.settings import read_settings
    from snaketron.settings.curation import CurateSettings

    record = curate_shard(
        args.filtered,
        exact=args.exact,
        near=args.near,
        index=args.index,
        tokenizer=args.tokenizer,
        settings=read_settings(CurateSettings, args.settings),
        num_examples=args.num_examples,
        output=args.output,
        record=args.record,
    )
    counts = record.counts
    logger.info(
        "%s: of %d documents %d are left; removed %s; changed %s; %.1f s",
        record.name,
        counts["documents"],
        counts["kept"]["documents"],
        describe(counts["removed"]),
        describe(counts["changed"]),
        record.seconds,
    )
    return 0


if __name__ == "__main__":
    run(main)
