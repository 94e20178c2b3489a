"""Render files of conversations to token ids and a mask of the assistant's answers."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from snaketron.log import argument_parser, logger, run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add(
        "--chats",
        nargs="+",
        type=Path,
        required=True,
        help="files of one shard, in order: .jsonl[.gz|.zst], .parquet or .arrow, one conversation a row",
    )
    add("--settings", required=True, help="RenderSettings as JSON")
    add("--tokenizer", type=Path, required=True, help="directory with tokenizer.json")
    add("--template", type=Path, required=True, help="chat template, a Jinja file")
    add("--output", type=Path, required=True, help="Parquet file to write")
    add("--record", type=Path, required=True, help="lineage record to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    from snaketron import files
    from snaketron.data import tokenizer
    from snaketron.data.chats.mask import Masker
    from snaketron.data.chats.render import Renderer
    from snaketron.data.chats.template import load_template, special_tokens
    from snaketron.lineage import record as lineage
    from snaketron.settings.chats import RenderSettings

    start = time.perf_counter()
    settings = RenderSettings.model_validate_json(args.settings)
    renderer = Renderer(
        template=load_template(
            args.template,
            variables=special_tokens(args.tokenizer),
            arguments=settings.template_arguments,
            off_arguments=settings.reasoning.off_arguments,
        ),
        masker=Masker(args.tokenizer),
        settings=settings,
    )
    metadata = {
        "source": settings.source,
        "tokenizer_sha256": tokenizer.info(args.tokenizer).sha256,
        "template_sha256": files.sha256(args.template),
    }
    with files.writing(args.output, args.record) as (output, record):
        counts = renderer.write(output, args.chats, metadata)
        value = lineage.record(
            "render_chat",
            f"{settings.source}/{args.output.stem}",
            inputs=[*renderer.read, args.tokenizer / "tokenizer.json", args.template],
            outputs={args.output: output},
            settings=metadata | settings.model_dump(),
            counts=counts,
        )
        record.write_bytes(files.to_json(value))
    logger.info(
        "%s: %d rows, %d conversations, %d sequences, %d tokens, %d of them trained, %d a second; "
        "dropped: %s",
        args.output,
        *(counts[name] for name in ("rows", "conversations", "sequences", "tokens", "trained_tokens")),
        counts["tokens"] / (time.perf_counter() - start),
        ", ".join(f"{count} x {reason}" for reason, count in counts["dropped"].items()) or "none",
    )
    return 0


if __name__ == "__main__":
    run(main)
