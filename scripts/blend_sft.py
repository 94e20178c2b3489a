"""Weigh the packed sources; nothing is repacked or copied."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.log import argument_parser, logger, run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--settings", required=True, help="BlendSettings as JSON")
    add("--records", nargs="+", type=Path, required=True, help="records of the packed shards (pack_sft)")
    add("--output", type=Path, required=True, help="blend to write")
    add("--record", type=Path, required=True, help="lineage record to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.data.chats.blend import build
    from snaketron.settings import read_settings
    from snaketron.settings.blends import BlendSettings

    settings = read_settings(BlendSettings, args.settings)
    record = build(settings, args.records, args.output, args.record)
    for split, total in record.counts.items():
        logger.info(
            "%s: %d packs, %d tokens, %d of them trained",
            split,
            *(total[name] for name in ("packs", "tokens", "trained_tokens")),
        )
    return 0


if __name__ == "__main__":
    run(main)
