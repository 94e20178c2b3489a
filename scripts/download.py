"""Download one file of the lock file, continue a partial one, and verify size and hash."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.log import argument_parser, logger, run
from snaketron.sources.download import download
from snaketron.sources.patience import Patience
from snaketron.wording import size_text


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument("--address", required=True, help="where the file lies")
    parser.add_argument("--size", type=int, required=True, help="its bytes, as listed")
    parser.add_argument("--sha256", required=True, help="its hash, as listed")
    parser.add_argument("--name", required=True, help="source and file, for the record")
    parser.add_argument("--output", type=Path, required=True, help="where it is put when it is complete")
    parser.add_argument("--record", type=Path, required=True, help="lineage record, written last")
    parser.add_argument(
        "--retries",
        type=int,
        default=Patience.retries,
        help="attempts in a row that bring nothing (default: %(default)s)",
    )
    parser.add_argument(
        "--stall-timeout",
        type=float,
        default=Patience.stall_timeout,
        metavar="SECONDS",
        help="connect again when nothing comes for so long (default: %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    record = download(
        args.address,
        output=args.output,
        size=args.size,
        sha256=args.sha256,
        record=args.record,
        name=args.name,
        patience=Patience(args.retries, args.stall_timeout),
    )
    logger.info("%s: %s, verified, %.1f s", args.output, size_text(args.size), record.seconds)
    return 0


if __name__ == "__main__":
    run(main, may_pass=True)  # the network
