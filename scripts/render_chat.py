"""Render files of conversations to token ids and a mask of the assistant's answers."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.log import argument_parser, logger, run
from snaketron.sources.formats import READABLE


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add(
        "--chats",
        nargs="+",
        type=Path,
        required=True,
        help=f"files of one shard, in order, one conversation a row: {READABLE}",
    )
    add("--settings", required=True, help="RenderSettings as JSON")
    add("--tokenizer", type=Path, required=True, help="directory with tokenizer.json")
    add("--template", type=Path, required=True, help="chat template, a Jinja file")
    add("--output", type=Path, required=True, help="Parquet file to write")
    add("--record", type=Path, required=True, help="lineage record to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    from snaketron.data.chats.render import render_chats
    from snaketron.settings import read_settings
    from snaketron.settings.chats import RenderSettings
    from snaketron.wording import counted

    record = render_chats(
        args.chats,
        settings=read_settings(RenderSettings, args.settings),
        tokenizer=args.tokenizer,
        template=args.template,
        output=args.output,
        record=args.record,
    )
    counts = record.counts
    logger.info(
        "%s: %d rows, %d conversations, %d sequences, %d tokens, %d of them trained, %d a second; "
        "dropped: %s",
        args.output,
        *(counts[name] for name in ("rows", "conversations", "sequences", "tokens", "trained_tokens")),
        counts["tokens"] / max(record.seconds, 1e-9),
        counted(counts["dropped"]),
    )
    return 0


if __name__ == "__main__":
    run(main)
