"""Write the hashes of the n-grams (of words) of the evaluation texts."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.log import argument_parser, logger, run


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--texts", type=Path, nargs="+", required=True, help="files of evaluation texts")
    parser.add_argument("--text-field", required=True, help="column or JSON key that holds the text")
    parser.add_argument("--n-grams", type=int, required=True, help="words of an n-gram")
    parser.add_argument("--output", type=Path, required=True, help="Parquet file to write")
    parser.add_argument("--record", type=Path, required=True, help="lineage record, written last")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.data.curation.decontamination import decontamination_index

    record = decontamination_index(
        args.texts, text_field=args.text_field, n=args.n_grams, output=args.output, record=args.record
    )
    for path, counts in record.counts.items():
        logger.info("%s: %d texts, %d n-grams", path, counts["texts"], counts["n_grams"])
    return 0


if __name__ == "__main__":
    run(main)
