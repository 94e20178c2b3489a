"""Pack the rendered conversations of a source, split by split; no conversation is split across packs."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.data.chats.packing import ALGORITHMS
from snaketron.log import argument_parser, logger, run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add(
        "--chats",
        nargs="+",
        type=Path,
        required=True,
        help="rendered conversations of one source (render_chat), packed together",
    )
    add("--pack-size", type=int, required=True, help="tokens of a pack")
    add(
        "--padding-multiple",
        type=int,
        default=1,
        help="leave room to pad each conversation to a multiple of this; it divides the pack size",
    )
    add(
        "--long-conversations",
        choices=("drop", "cut_at_answer", "cut_unfinished"),
        default="drop",
        help="what becomes of conversations with more tokens than a pack",
    )
    add(
        "--max-dropped-fraction",
        type=float,
        default=1.0,
        help="share of the conversations that may be left out; more is an error",
    )
    add("--algorithm", choices=ALGORITHMS, required=True, help="which conversations share a pack")
    add("--seed", type=int, help="seed of first_fit_shuffle; other algorithms take none")
    add("--train", type=Path, required=True, help="Parquet file to write")
    add("--valid", type=Path, required=True, help="Parquet file to write")
    add("--test", type=Path, required=True, help="Parquet file to write")
    add("--record", type=Path, required=True, help="lineage record to write")
    args = parser.parse_args(argv)
    if args.pack_size % args.padding_multiple:
        parser.error(
            f"--padding-multiple {args.padding_multiple} does not divide --pack-size {args.pack_size}"
        )
    if args.algorithm != "first_fit_shuffle":
        args.seed = None
    elif args.seed is None:
        parser.error("--algorithm first_fit_shuffle needs --seed")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)

    from snaketron.data.chats.pack import pack_chats
    from snaketron.wording import counted

    outputs = {"train": args.train, "valid": args.valid, "test": args.test}
    record = pack_chats(
        args.chats,
        pack_size=args.pack_size,
        algorithm=args.algorithm,
        seed=args.seed,
        padding_multiple=args.padding_multiple,
        long_conversations=args.long_conversations,
        max_dropped_fraction=args.max_dropped_fraction,
        outputs=outputs,
        record=args.record,
    )
    for split, counts in record.counts["splits"].items():
        logger.info(
            "%s: %d conversations in %d packs, %d tokens, %d trained, %.1f %% full; cut: %d; dropped: %s",
            outputs[split],
            *(counts[name] for name in ("packed", "packs", "tokens", "trained_tokens")),
            100 * counts["efficiency"],
            counts["cut"],
            counted(counts["dropped"]),
        )
    return 0


if __name__ == "__main__":
    run(main)
