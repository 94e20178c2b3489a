"""Weigh the packed sources; nothing is repacked or copied."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.log import argument_parser, logger, run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add(
        "--weights", nargs="+", required=True, metavar="SOURCE=WEIGHT", help="share of each source in the mix"
    )
    add("--records", nargs="+", type=Path, required=True, help="records of the packed shards (pack_sft)")
    add("--output", type=Path, required=True, help="blend to write")
    add("--record", type=Path, required=True, help="lineage record to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    from snaketron import files
    from snaketron.data.chats.blend import blend, check_unique, parse_weights
    from snaketron.lineage import record as lineage

    weights = parse_weights(args.weights)
    check_unique(args.records)
    value = blend(weights, {path: lineage.read(path) for path in args.records})
    with files.writing(args.output, args.record) as (output, record):
        output.write_bytes(files.to_json(value))
        totals = {
            split: {
                name: sum(source[name] for source in sources)
                for name in ("packs", "tokens", "trained_tokens")
            }
            for split, sources in value["splits"].items()
        }
        line = lineage.record(
            "blend_sft",
            "sft",
            inputs=args.records,
            outputs={args.output: output},
            settings={"weights": weights},
            counts=totals,
        )
        record.write_bytes(files.to_json(line))
    for split, total in totals.items():
        logger.info(
            "%s: %d packs, %d tokens, %d of them trained",
            split,
            *(total[name] for name in ("packs", "tokens", "trained_tokens")),
        )
    return 0


if __name__ == "__main__":
    run(main)
