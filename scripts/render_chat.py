"""Render one file of conversations to token ids and a mask of what the assistant said."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.log import argument_parser, logger, run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--chats", type=Path, required=True, help=".jsonl[.gz|.zst] or .parquet, one conversation a row")
    add("--source", required=True, help="name of the source")
    add("--messages-field", required=True, help="field that holds the list of messages")
    add("--tools-field", required=True, help="field that holds the tool definitions; rows may lack it")
    add("--tokenizer", type=Path, required=True, help="directory with tokenizer.json")
    add("--template", type=Path, required=True, help="chat template with generation blocks")
    add("--valid-fraction", type=float, required=True, help="share of the conversations for validation")
    add("--test-fraction", type=float, required=True, help="share of the conversations for the test")
    add("--output", type=Path, required=True, help="Parquet file to write")
    add("--record", type=Path, required=True, help="lineage record to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    from snaketron import files, lineage
    from snaketron.data import tokenizer
    from snaketron.data.chat import load_template, special_tokens
    from snaketron.data.rendered import Renderer
    from snaketron.data.rows import read_rows

    renderer = Renderer(
        template=load_template(args.template, variables=special_tokens(args.tokenizer)),
        tokenizer=tokenizer.load(args.tokenizer),
        messages_field=args.messages_field,
        tools_field=args.tools_field,
        valid_fraction=args.valid_fraction,
        test_fraction=args.test_fraction,
    )
    metadata = {
        "source": args.source,
        "tokenizer_sha256": tokenizer.info(args.tokenizer).sha256,
        "template_sha256": files.sha256(args.template),
    }
    rows = read_rows(args.chats, required=[args.messages_field], optional=[args.tools_field])
    with files.writing(args.output, args.record) as (output, record):
        counts = renderer.write(output, rows, args.chats, metadata)
        value = lineage.record(
            "render_chat",
            f"{args.source}/{args.output.stem}",
            inputs=[args.chats, args.tokenizer / "tokenizer.json", args.template],
            outputs={args.output: output},
            settings={
                **metadata,
                "messages_field": args.messages_field,
                "tools_field": args.tools_field,
                "valid_fraction": args.valid_fraction,
                "test_fraction": args.test_fraction,
            },
            counts=counts,
        )
        record.write_bytes(files.to_json(value))
    logger.info(
        "%s: %d rows, %d conversations, %d tokens, %d of them trained; dropped: %s",
        args.output,
        *(counts[name] for name in ("rows", "conversations", "tokens", "trained_tokens")),
        ", ".join(f"{count} x {reason}" for reason, count in counts["dropped"].items()) or "none",
    )
    return 0


if __name__ == "__main__":
    run(main)
