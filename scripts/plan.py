"""What a configuration takes: jobs, tokens, time, memory and disk, without data, a GPU or a network."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.config import ConfigError, load
from snaketron.files import write_json
from snaketron.graph.configfiles import merged
from snaketron.log import UserError, argument_parser, run

SUPER = Path("config/super.yaml")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--configfile",
        type=Path,
        nargs="+",
        default=[],
        help="configuration files, as you give them to snakemake",
    )
    parser.add_argument("--json", type=Path, help="write the plan there as JSON, too")
    parser.add_argument(
        "--published",
        action="store_true",
        help=f"compare estimates for {SUPER} with what was published about it, and plan nothing",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.graph.plan import plan
    from snaketron.report.plan import comparison, markdown
    from snaketron.sizes.published import compare

    try:
        if args.published:
            print(comparison(compare(load(merged([SUPER])))), end="")
            return 0
        found = plan(load(merged(args.configfile)))
    except ConfigError as error:
        raise UserError(f"the configuration is wrong.\n{error}") from None
    if args.json:
        write_json(args.json, found)
    print(markdown(found), end="")
    return 0


if __name__ == "__main__":
    run(main)
