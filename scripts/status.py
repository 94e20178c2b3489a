"""Show where the jobs of this directory's workflow stand in Slurm, a line a job, once."""

from __future__ import annotations

from pathlib import Path

from snaketron.jobs import status
from snaketron.log import argument_parser, run


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--ckpt", type=Path, default=Path("ckpt"), help="root of the checkpoints")
    args = parser.parse_args(argv)
    print("\n".join(status.lines(Path.cwd(), args.ckpt)) or "Slurm has no job of this directory")
    return 0


if __name__ == "__main__":
    run(main)
