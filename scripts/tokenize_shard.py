"""Tokenize one raw file into a Megatron .bin/.idx pair for each of train, valid and test."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from snaketron.data.split import SPLITS
from snaketron.log import argument_parser, run

logger = logging.getLogger("snaketron")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--text", type=Path, required=True, help="raw file: .jsonl[.gz|.zst] or .parquet")
    parser.add_argument("--text-field", required=True, help="column or JSON key that holds the document")
    parser.add_argument("--corpus", required=True, help="name of the corpus")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory of the tokenizer")
    parser.add_argument(
        "--valid-fraction", type=float, required=True, help="share of documents for validation"
    )
    parser.add_argument("--test-fraction", type=float, required=True, help="share of documents for the test")
    parser.add_argument(
        "--bins", type=Path, nargs=3, required=True, metavar=tuple(f"{s.upper()}.bin" for s in SPLITS)
    )
    parser.add_argument("--record", type=Path, required=True, help="lineage record, written last")
    args = parser.parse_args(argv)
    if any(path.suffix != ".bin" for path in args.bins):
        parser.error("--bins: each path must end in .bin")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.data.tokenize import tokenize_shard

    record = tokenize_shard(
        args.text,
        text_field=args.text_field,
        corpus=args.corpus,
        tokenizer=args.tokenizer,
        valid_fraction=args.valid_fraction,
        test_fraction=args.test_fraction,
        bins=dict(zip(SPLITS, args.bins, strict=True)),
        record=args.record,
    )
    counts = record["counts"]
    logger.info(
        "%s: %d documents, %d dropped %s; %s; %.1f s",
        args.text,
        counts["documents"],
        sum(counts["dropped"].values()),
        counts["dropped"],
        ", ".join(f"{s} {counts[s]['documents']} documents, {counts[s]['tokens']} tokens" for s in SPLITS),
        record["seconds"],
    )
    return 0


if __name__ == "__main__":
    run(main)
