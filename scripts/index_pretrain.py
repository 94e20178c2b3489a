"""Build the sample index of a phase with megatron-core, so that no GPU waits for it."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.config.data import SPLITS
from snaketron.log import argument_parser, logger, run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--blend", type=Path, required=True, help="blend.json of the phase")
    parser.add_argument("--settings", required=True, help="IndexSettings as JSON")
    parser.add_argument("--output", type=Path, required=True, help="directory of the index")
    parser.add_argument("--record", type=Path, required=True, help="lineage record, written last")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.data.text import index
    from snaketron.settings import read_settings
    from snaketron.settings.training import IndexSettings

    settings = read_settings(IndexSettings, args.settings)
    record = index.build(args.blend, settings, output=args.output, record=args.record)
    for split in SPLITS:
        if taken := record.counts[split]:
            shares = ", ".join(f"{name} {n / taken['samples']:.2%}" for name, n in taken["corpora"].items())
            logger.info("%s: %d samples; %s", split, taken["samples"], shares)
        else:
            logger.info("%s: no tokens", split)
    return 0


if __name__ == "__main__":
    run(main)
