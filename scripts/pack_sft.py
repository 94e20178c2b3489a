"""Pack rendered conversations, each split by itself; no conversation is split across packs."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.data.packing import ALGORITHMS
from snaketron.log import argument_parser, logger, run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--chats", type=Path, required=True, help="rendered conversations (render_chat)")
    add("--pack-size", type=int, required=True, help="tokens of a pack; longer conversations are dropped")
    add("--algorithm", choices=ALGORITHMS, required=True)
    add("--train", type=Path, required=True, help="Parquet file to write")
    add("--valid", type=Path, required=True, help="Parquet file to write")
    add("--test", type=Path, required=True, help="Parquet file to write")
    add("--record", type=Path, required=True, help="lineage record to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    from snaketron import files, lineage
    from snaketron.data.pack_sft import Chats, pack_split

    chats = Chats.read(args.chats)
    targets = {"train": args.train, "valid": args.valid, "test": args.test}
    settings = {
        **chats.metadata,
        "pack_size": args.pack_size,
        "algorithm": args.algorithm,
        "padding_multiple": 1,
    }
    with files.writing(*targets.values(), args.record) as temporary:
        outputs = dict(zip(targets.values(), temporary, strict=False))
        counts = {
            split: pack_split(chats, split, outputs[target], metadata=settings)
            for split, target in targets.items()
        }
        value = lineage.record(
            "pack_sft",
            f"{chats.metadata['source']}/{args.chats.stem}",
            inputs=[args.chats],
            outputs=outputs,
            settings=settings,
            counts={"splits": counts},
        )
        temporary[-1].write_bytes(files.to_json(value))
    for split, count in counts.items():
        logger.info(
            "%s: %d conversations in %d packs, %d tokens, %d of them trained, %.1f %% full; dropped: %s",
            targets[split],
            *(count[name] for name in ("packed", "packs", "tokens", "trained_tokens")),
            100 * count["efficiency"],
            ", ".join(f"{number} x {reason}" for reason, number in count["dropped"].items()) or "none",
        )
    return 0


if __name__ == "__main__":
    run(main)
