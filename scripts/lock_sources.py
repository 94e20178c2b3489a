"""List the files of hub data sets and other addresses, with sizes and hashes, into the lock file.

Run it once, and commit the file: the workflow reads which files there are from it, without the network.
"""

from __future__ import annotations

import argparse

from snaketron.config import ConfigError
from snaketron.graph import configfiles
from snaketron.log import UserError, argument_parser, run
from snaketron.sources.patience import Patience


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    configfiles.add_option(parser)
    parser.add_argument("--source", nargs="+", default=[], help="only these sources (default: all)")
    parser.add_argument(
        "--update", action="store_true", help="list listed sources again, at their newest revision"
    )
    parser.add_argument(
        "--retries",
        type=int,
        default=4,
        help="attempts in a row that bring nothing (default: %(default)s)",
    )
    parser.add_argument(
        "--stall-timeout",
        type=float,
        default=30,
        metavar="SECONDS",
        help="ask again when nothing comes for so long; a long listing may take ten times as long "
        "(default: %(default)g)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        config = configfiles.configuration(args.configfile)
    except ConfigError as error:
        raise UserError(f"the configuration is wrong.\n{error}") from None
    from snaketron.sources.listing import lock_sources

    lock_sources(
        config,
        names=args.source,
        update=args.update,
        patience=Patience(args.retries, args.stall_timeout),
    )
    return 0


if __name__ == "__main__":
    run(main)
