"""Delete the versions of checkpoints that no published link leads to, oldest first."""

from __future__ import annotations

from pathlib import Path

from snaketron.log import argument_parser, logger, run


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--ckpt", type=Path, default=Path("ckpt"), help="root of the checkpoints")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    args = parser.parse_args(argv)

    from snaketron.jobs.version import remove, unpublished

    for version in unpublished(args.ckpt):
        size = sum(p.stat().st_size for p in version.rglob("*") if p.is_file())
        logger.info("%s %s (%.1f MB)", "would delete" if args.dry_run else "delete", version, size / 1e6)
        if not args.dry_run:
            remove(version)
    return 0


if __name__ == "__main__":
    run(main)
