"""Train a byte-level BPE tokenizer on text, or take a Hugging Face one; both give the same files."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.log import argument_parser, logger, run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--path", help="directory of a fast tokenizer; without it one is trained")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="files to train on")
    parser.add_argument("--text-field", default="text", help="column or JSON key that holds the document")
    parser.add_argument("--vocab-size", type=int, help="tokens of a trained tokenizer, special ones included")
    parser.add_argument(
        "--output", type=Path, required=True, help="tokenizer.json; its config goes beside it"
    )
    parser.add_argument("--record", type=Path, required=True, help="lineage record, written last")
    args = parser.parse_args(argv)
    if bool(args.path) == bool(args.text):
        parser.error("give either --path or --text")
    if args.text and args.vocab_size is None:
        parser.error("--text needs --vocab-size")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.data import tokenizer

    record = tokenizer.build(
        path=args.path,
        text=args.text,
        text_field=args.text_field,
        vocab_size=args.vocab_size,
        output=args.output,
        record=args.record,
    )
    logger.info("%s: %d tokens; %.1f s", args.output, record.counts["vocab_size"], record.seconds)
    return 0


if __name__ == "__main__":
    run(main, may_pass=True)  # the network
