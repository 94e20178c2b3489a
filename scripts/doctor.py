"""Check in under a minute whether this machine can train, and say what is wrong.

Under `srun`, with a process for each GPU, check whether the nodes of the allocation can train together.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from snaketron.log import run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path("ckpt"),
        metavar="DIRECTORY",
        help="where checkpoints will lie (default: ckpt)",
    )
    parser.add_argument(
        "--gpus",
        type=int,
        default=0,
        metavar="N",
        help="GPUs that each node must have (default: however many)",
    )
    args = parser.parse_args(argv)
    from snaketron.train import doctor, doctor_nodes

    if (here := doctor_nodes.rank()) is None:
        return 0 if doctor.report(doctor.examine(args.directory, args.gpus)) else 1
    found = list(doctor_nodes.examine(here, args.directory, args.gpus))
    if here.number and not found:  # the first process reports
        return 0
    return 0 if doctor.report(iter(found), what="These nodes") else 1


if __name__ == "__main__":
    run(main)
