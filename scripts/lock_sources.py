"""List the files of hub data sets and other addresses, with sizes and hashes, into the lock file.

Run it once, and commit the file: the workflow reads which files there are from it, without the network.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from snaketron.config import ConfigError, load
from snaketron.config.doubled import check_doubled
from snaketron.log import UserError, argument_parser, run
from snaketron.sources.patience import Patience

DEFAULT_CONFIG = Path("config/config.yaml")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--configfile",
        type=Path,
        nargs="+",
        default=[],
        help="configuration files, as you give them to snakemake",
    )
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
        config = load(merged(args.configfile))
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


def merged(configfiles: list[Path]) -> dict[str, Any]:
    """The configuration as Snakemake merges it: the defaults, and over them the files in their order."""
    from snakemake.common.configfile import load_configfile
    from snakemake.exceptions import WorkflowError
    from snakemake.utils import update_config

    check_doubled([DEFAULT_CONFIG, *configfiles])
    config: dict[str, Any] = {}
    for path in [DEFAULT_CONFIG, *configfiles]:
        try:
            update_config(config, load_configfile(path))
        except (WorkflowError, OSError) as error:
            raise UserError(f"--configfile {path}: {error}") from None
    return config


if __name__ == "__main__":
    run(main)
