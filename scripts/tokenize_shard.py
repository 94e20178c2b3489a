"""Tokenize the raw files of a shard into a Megatron .bin/.idx pair for each of train, valid and test."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from snaketron.config.data import SPLITS
from snaketron.log import argument_parser, logger, run
from snaketron.sources.formats import READABLE


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        required=True,
        help=f"raw files: {READABLE}; what curate_shard wrote, too",
    )
    parser.add_argument("--settings", required=True, help="TokenizeSettings as JSON")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory of the tokenizer")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; the result is the same")
    parser.add_argument(
        "--bins", type=Path, nargs=3, required=True, metavar=tuple(f"{s.upper()}.bin" for s in SPLITS)
    )
    parser.add_argument(
        "--documents", type=Path, required=True, help="Parquet file that says where each sequence comes from"
    )
    parser.add_argument("--record", type=Path, required=True, help="lineage record, written last")
    args = parser.parse_args(argv)
    if any(path.suffix != ".bin" for path in args.bins):
        parser.error("--bins: each path must end in .bin")
    if args.threads < 1:
        parser.error("--threads: at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    # fastokens reads the first two variables when it is first used, and `tokenizers` the last one.
    os.environ["FASTOKENS_BPE_THREADS"] = os.environ["RAYON_NUM_THREADS"] = str(args.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = str(args.threads > 1).lower()
    from snaketron.data.text.tokenize import tokenize_shard
    from snaketron.settings import read_settings
    from snaketron.settings.text import TokenizeSettings

    record = tokenize_shard(
        args.text,
        settings=read_settings(TokenizeSettings, args.settings),
        tokenizer=args.tokenizer,
        bins=dict(zip(SPLITS, args.bins, strict=True)),
        table=args.documents,
        record=args.record,
        threads=args.threads,
    )
    counts = record.counts
    num_tokens = sum(counts[split]["tokens"] for split in SPLITS)
    logger.info(
        "%s: %d documents, %d dropped %s, %d cut; %s; encoded by %s, %d documents compared; "
        "%.1f s, %.2f million tokens a second",
        ", ".join(map(str, args.text)),
        counts["documents"],
        sum(counts["dropped"].values()),
        counts["dropped"],
        counts["cut"],
        ", ".join(f"{s} {counts[s]['documents']} documents, {counts[s]['tokens']} tokens" for s in SPLITS),
        counts["encoder"],
        counts["checked"],
        record.seconds,
        num_tokens / max(record.seconds, 1e-9) / 1e6,
    )
    return 0


if __name__ == "__main__":
    run(main)
