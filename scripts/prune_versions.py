"""Delete the versions of checkpoints that no published link leads to, oldest first."""

from __future__ import annotations

from pathlib import Path

from snaketron.log import argument_parser, logger, run


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--ckpt", type=Path, default=Path("ckpt"), help="root of the checkpoints")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    args = parser.parse_args(argv)

    from snaketron.jobs.owner import remove
    from snaketron.jobs.version import unpublished

    verb = "would delete" if args.dry_run else "delete"
    for version in unpublished(args.ckpt):
        size = sum(path.stat().st_size for path in version.directory.rglob("*") if path.is_file())
        logger.info("%s %s (%.1f MB)", verb, version.directory, size / 1e6)
        if not args.dry_run:
            remove(version)
    return 0


if __name__ == "__main__":
    run(main)
