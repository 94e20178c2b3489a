"""Show where the jobs of this directory's workflow stand in Slurm, a line a job.

With --watch show the whole run, on Slurm or not, running or finished. Without Slurm show that once.
"""

from __future__ import annotations

import os
from pathlib import Path

from snaketron.jobs import slurm, status
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
    parser.add_argument(
        "--watch",
        action="store_true",
        help="show stages, steps, losses, speed and time left, until Ctrl-C; once where there is no terminal",
    )
    args = parser.parse_args(argv)
    from snaketron.report import view

    if args.watch:
        view.watch(Path.cwd(), colors=not os.environ.get("NO_COLOR"))
        return 0
    try:
        if lines := status.lines(Path.cwd(), args.ckpt):
            print("\n".join(lines))
            return 0
        logger.info("Slurm has no job of this directory. The files of the run say:")
    except slurm.NoAnswer as error:
        logger.warning("%s. The files of the run say:", error.last)
    view.show(Path.cwd())
    return 0


if __name__ == "__main__":
    run(main)
