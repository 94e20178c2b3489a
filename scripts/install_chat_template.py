"""Check a chat template and put it beside the tokenizer; a changed template tokenizes no text again."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.log import argument_parser, logger, run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--settings", required=True, help="TemplateSettings as JSON")
    parser.add_argument("--output", type=Path, required=True, help="chat_template.jinja")
    parser.add_argument("--record", type=Path, required=True, help="lineage record, written last")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.data.chats.install import install_template
    from snaketron.settings import read_settings
    from snaketron.settings.tokenizer import TemplateSettings

    settings = read_settings(TemplateSettings, args.settings)
    record = install_template(settings, output=args.output, record=args.record)
    logger.info("%s: %d characters; %.1f s", args.output, record.counts["characters"], record.seconds)
    return 0


if __name__ == "__main__":
    run(main)
