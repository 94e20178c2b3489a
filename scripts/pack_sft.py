"""Pack the rendered conversations of a source, split by split; no conversation is split across packs."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.config.data import SPLITS
from snaketron.log import argument_parser, logger, run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add(
        "--chats",
        nargs="+",
        type=Path,
        required=True,
        help="rendered conversations of one source (render_chat), packed together",
    )
    add("--settings", required=True, help="PackSettings as JSON")
    add(
        "--max-dropped-fraction",
        type=float,
        default=1.0,
        help="share of the conversations that may be left out; more is an error",
    )
    for split in SPLITS:
        add(f"--{split}", type=Path, required=True, help="Parquet file to write")
    add("--record", type=Path, required=True, help="lineage record to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.data.chats.pack import pack_chats
    from snaketron.settings import read_settings
    from snaketron.settings.chats import PackSettings
    from snaketron.wording import counted

    outputs = {split: getattr(args, split) for split in SPLITS}
    record = pack_chats(
        args.chats,
        settings=read_settings(PackSettings, args.settings),
        max_dropped_fraction=args.max_dropped_fraction,
        outputs=outputs,
        record=args.record,
    )
    for split, counts in record.counts["splits"].items():
        logger.info(
            "%s: %d conversations in %d packs, %d tokens, %d trained, %.1f %% full; cut: %d; dropped: %s",
            outputs[split],
            *(counts[name] for name in ("packed", "packs", "tokens", "trained_tokens")),
            100 * counts["efficiency"],
            counts["cut"],
            counted(counts["dropped"]),
        )
    return 0


if __name__ == "__main__":
    run(main)
