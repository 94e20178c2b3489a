"""What Slurm says of jobs: squeue, which every cluster has, and sacct where there is accounting."""

from __future__ import annotations

import pwd
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from snaketron.jobs import slurm

# States in which a job is over. In all others it waits, runs, or is about to.
OVER = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "PREEMPTED"),
    *("BOOT_FAIL", "DEADLINE", "REVOKED"),
}


def states(name: str, clusters: Collection[str] = ()) -> dict[str, str]:
    """The states of all jobs of a name that Slurm still knows, by number; `slurm.NoAnswer`."""
    where = [f"--clusters={','.join(sorted(clusters))}"] if clusters else []
    said = slurm.ask("squeue", "--noheader", "--states=all", f"--name={name}", "--format=%i|%T", *where)
    rows = (line.strip().split("|") for line in said.splitlines())
    return {row[0]: row[1] for row in rows if len(row) == 2}


@dataclass(frozen=True)
class Other:
    """A job that is not over."""

    number: str
    name: str  # of the run of Snakemake that submitted it
    waits: bool  # it does not run yet
    directory: Path
    comment: str  # names its rule and wildcards


def others(directory: Path, name: str) -> list[Other]:
    """Jobs of rules in `directory` that are not of the run `name`; `slurm.NoAnswer`."""
    return [job for job in _mine() if job.directory == directory and job.name != name]


def of_run(name: str) -> list[Other]:
    """Jobs of the run `name`; `slurm.NoAnswer`."""
    return [job for job in _mine() if job.name == name]


def _mine() -> list[Other]:
    rows = (line.strip().split("|", 4) for line in slurm.ask(*_MINE).splitlines())
    return [
        Other(number, name, state == "PENDING", Path(where), comment)
        for number, state, name, where, comment in (row for row in rows if len(row) == 5)
        if comment.startswith("rule_") and state not in OVER
    ]


_MINE = ("squeue", "--me", "--noheader", "--format=%i|%T|%j|%Z|%k")


def cancelled_by(job: str) -> str | None:
    """Who cancelled a job, from accounting; None where it does not say. Raises `slurm.NoAnswer`."""
    command = ("sacct", "-X", "--noheader", "--parsable2", f"--jobs={job}", "--format=State")
    said = slurm.ask(*command, seconds=10)
    if not (match := re.search(r"CANCELLED by (\d+)", said)):
        return None
    try:
        return pwd.getpwuid(int(match[1])).pw_name
    except KeyError:
        return f"user {match[1]}"
