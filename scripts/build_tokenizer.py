"""Train a byte-level BPE tokenizer on text, or take a Hugging Face one; both give the same files."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.log import argument_parser, logger, run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--settings", required=True, help="TokenizerSettings as JSON")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="files that one is trained on")
    parser.add_argument("--reading", default="{}", help="ReadSettings as JSON: what becomes of bad rows")
    parser.add_argument(
        "--output", type=Path, required=True, help="tokenizer.json; its config goes beside it"
    )
    parser.add_argument("--record", type=Path, required=True, help="lineage record, written last")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.data import tokenizer
    from snaketron.settings import read_settings
    from snaketron.settings.text import ReadSettings
    from snaketron.settings.tokenizer import TokenizerSettings

    settings = read_settings(TokenizerSettings, args.settings)
    reading = read_settings(ReadSettings, args.reading, "--reading")
    record = tokenizer.build(
        args.text, settings=settings, reading=reading, output=args.output, record=args.record
    )
    logger.info("%s: %d tokens; %.1f s", args.output, record.counts["vocab_size"], record.seconds)
    return 0


if __name__ == "__main__":
    run(main, may_pass=True)  # the network
