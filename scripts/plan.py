"""What a configuration takes: jobs, tokens, time, memory and disk, without data, a GPU or a network."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.config import Config, ConfigError
from snaketron.files import write_json, writing
from snaketron.graph import configfiles
from snaketron.log import UserError, argument_parser, logger, run
from snaketron.sizes.gpus import GPUS, in_nodes

SUPER, NANO = Path("config/super.yaml"), Path("config/nano.yaml")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argument_parser(__doc__)
    configfiles.add_option(parser)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the plan or the layouts there as JSON, too"
    )
    parser.add_argument(
        "--published",
        action="store_true",
        help=f"compare estimates for {SUPER} with what was published about it, and plan nothing",
    )
    parser.add_argument(
        "--search",
        metavar="TRAINING",
        help="list layouts for a training, such as pretrain/broad, the fastest first, and plan nothing",
    )
    parser.add_argument(
        "--rate",
        type=Path,
        metavar="FILE",
        help="draw the learning rate of all phases there, as SVG, and plan nothing",
    )
    parser.add_argument(
        "--gpu", choices=sorted(GPUS), help="with --search: the kind of GPU (default: cluster.gpu)"
    )
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="with --search: the number of GPUs (default: that of the configured layout)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from snaketron.graph.plan import plan
    from snaketron.report.plan import comparison, markdown
    from snaketron.sizes.published import compare

    if not args.search and (args.gpu or args.gpus is not None):
        raise UserError("--gpu and --gpus belong to --search TRAINING")
    try:
        if args.published:
            both = (configfiles.configuration([path]) for path in (SUPER, NANO))
            print(comparison(compare(*both)), end="")
            return 0
        config = configfiles.configuration(args.configfile)
        if said := configfiles.mixed(args.configfile):
            logger.warning(said)
        if args.rate:
            from snaketron.report.rate import draw

            with writing(args.rate) as [path]:
                path.write_bytes(draw(config))
            logger.info("the learning rate of all phases: %s", args.rate)
            return 0
        if args.search:
            return search_layouts(config, args)
        found = plan(config)
    except ConfigError as error:
        raise UserError(f"the configuration is wrong.\n{error}") from None
    if args.json:
        write_json(args.json, found)
    print(markdown(found), end="")
    return 0


def search_layouts(config: Config, args: argparse.Namespace) -> int:
    """Print the layouts for a training."""
    from snaketron.report.layouts import as_json, markdown
    from snaketron.sizes.search import measure, search, why_none

    names = [training.name for training in config.trainings()]
    if args.search not in names:
        raise UserError(f"--search {args.search}: no training of that name; known: {', '.join(names)}")
    training = config.training(args.search)
    if args.gpus is not None and args.gpus < 1:
        raise UserError(f"--gpus {args.gpus}: at least 1")
    gpu, number = args.gpu or config.cluster.gpu, args.gpus or training.run.parallel.world_size
    if gpu is None:
        raise UserError(f"which GPU? Give --gpu, or cluster.gpu; known: {', '.join(GPUS)}")
    found = search(config, training, gpu, number)
    if args.json:
        write_json(args.json, as_json(found))
    own, on = measure(config, training, in_nodes(gpu, config.cluster)), f"{number} {gpu.upper()}"
    why = "" if found else why_none(config, training, gpu, number)
    print(markdown(training, on, found, own, why), end="")
    return 0


if __name__ == "__main__":
    run(main)
