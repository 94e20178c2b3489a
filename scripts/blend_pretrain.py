"""Weigh the tokenized shards of a phase, after checking that each is complete."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.config.data import SPLITS
from snaketron.log import argument_parser, logger, run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--settings", required=True, help="PhaseSettings as JSON")
    parser.add_argument(
        "--max-epochs", type=float, required=True, help="warn when a corpus is repeated more often"
    )
    parser.add_argument(
        "--records", type=Path, nargs="+", required=True, help="records of the tokenized shards"
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory of the tokenizer")
    parser.add_argument("--output", type=Path, required=True, help="blend.json")
    parser.add_argument("--record", type=Path, required=True, help="lineage record, written last")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.data.text import blend
    from snaketron.settings import read_settings
    from snaketron.settings.blends import PhaseSettings

    result = blend.build(
        read_settings(PhaseSettings, args.settings),
        max_epochs=args.max_epochs,
        records=args.records,
        tokenizer=args.tokenizer,
        output=args.output,
        record=args.record,
    )
    for name in SPLITS:
        split = getattr(result, name)
        shares = ", ".join(
            f"{c.corpus} {c.share:.1%} from {c.tokens} tokens"
            + (f" ({c.taken} taken, {c.epochs:.2f} epochs)" if c.epochs is not None else "")
            for c in split.corpora
        )
        logger.info("%s: %d shards, %d tokens; %s", name, len(split.shards), split.tokens, shares or "empty")
    return 0


if __name__ == "__main__":
    run(main)
