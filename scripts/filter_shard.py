"""Let datatrove's filters choose the documents of a shard of raw files."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.log import argument_parser, logger, run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="raw files, in order")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="directory of the tokenizer that counts tokens"
    )
    parser.add_argument("--settings", required=True, help="FilterSettings as JSON")
    parser.add_argument(
        "--num-examples", type=int, default=3, help="removed documents to list for each reason"
    )
    parser.add_argument("--output", type=Path, required=True, help="CORPUS/SHARD.parquet to write")
    parser.add_argument("--record", type=Path, required=True, help="lineage record, written last")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.data.curation.documents import describe
    from snaketron.data.curation.filters import filter_shard
    from snaketron.settings import read_settings
    from snaketron.settings.curation import FilterSettings

    record = filter_shard(
        args.text,
        tokenizer=args.tokenizer,
        settings=read_settings(FilterSettings, args.settings),
        num_examples=args.num_examples,
        output=args.output,
        record=args.record,
    )
    counts = record.counts
    logger.info(
        "%s: %d documents, %d kept; removed %s; rewritten %s; %.1f s",
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
