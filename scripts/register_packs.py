"""Verify packed conversations from elsewhere, and write them with the footer that trainings check."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.config.data import SPLITS
from snaketron.log import argument_parser, logger, run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--packs", type=Path, required=True, help="Parquet file, as Megatron-Bridge reads it")
    add("--settings", required=True, help="RegisterPacksSettings as JSON")
    add("--tokenizer", type=Path, required=True, help="directory of the tokenizer")
    for split in SPLITS:
        add(f"--{split}", type=Path, required=True, help="Parquet file to write")
    add("--record", type=Path, required=True, help="lineage record to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.data.chats.register import register_packs
    from snaketron.settings import read_settings
    from snaketron.settings.registering import RegisterPacksSettings

    settings = read_settings(RegisterPacksSettings, args.settings)
    record = register_packs(
        args.packs,
        settings=settings,
        tokenizer=args.tokenizer,
        outputs={split: getattr(args, split) for split in SPLITS},
        record=args.record,
    )
    counts = record.counts["splits"][settings.split]
    logger.info(
        "%s: %d conversations in %d packs of %s, %d tokens, %d trained",
        args.packs,
        *(counts["packed"], counts["packs"], settings.split, counts["tokens"], counts["trained_tokens"]),
    )
    return 0


if __name__ == "__main__":
    run(main)
