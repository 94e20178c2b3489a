"""Check in under a minute whether this machine can train, and say what is wrong."""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.log import run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("ckpt"), help="where checkpoints will lie")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that must be there")
    args = parser.parse_args(argv)
    from snaketron.train.doctor import examine, report

    return 0 if report(examine(args.directory, args.gpus)) else 1


if __name__ == "__main__":
    run(main)
