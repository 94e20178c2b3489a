"""List the versions of checkpoints, and delete those that nothing needs any more, oldest first.

What is published, what it was built on, and trainings that run or can be continued stay.
"""

from __future__ import annotations

from pathlib import Path

from snaketron.log import argument_parser, logger, run


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "--ckpt",
        type=Path,
        default=Path("ckpt"),
        metavar="DIRECTORY",
        help="root of the checkpoints, where pathvars.ckpt has moved it (default: ckpt)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    parser.add_argument("--stopped", action="store_true", help="delete interrupted trainings as well")
    parser.add_argument(
        "--bases", action="store_true", help="delete what others were built on, unless published itself"
    )
    args = parser.parse_args(argv)

    from snaketron.jobs import inventory
    from snaketron.wording import plural, size_text

    items = inventory.inventory(args.ckpt, keep_bases=not args.bases, keep_stopped=not args.stopped)
    if not items:
        where = args.ckpt / "versions"
        logger.warning("%s: holds no versions; --ckpt names the root of the checkpoints", where)
    loose = inventory.superseded(items)
    verb = "would delete" if args.dry_run else "delete"
    for item in items:
        logger.info("%-12s %s", verb if item in loose else "keep", item)
    size = size_text(sum(item.size for item in loose))
    logger.info("%s %s of %s, %s", verb, len(loose), plural(len(items), "version"), size)
    for item in items if args.stopped else ():
        if item.unanswered:
            logger.warning(
                "%s stays, since Slurm cannot be asked here whether its job goes on; give --stopped on a "
                "machine of the cluster, or delete it yourself in %s if this is a copy of the run",
                item.name,
                args.ckpt / "versions",
            )
    if not args.dry_run:
        inventory.remove_leftovers(args.ckpt)
        for item in loose:
            if not inventory.remove(item.version, args.ckpt):
                logger.warning("%s has been published again, and stays", item.name)
    return 0


if __name__ == "__main__":
    run(main)
