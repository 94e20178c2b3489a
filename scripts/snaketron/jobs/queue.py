"""Slurm's queue: what squeue, which every cluster has, says of jobs, and sacct where there is accounting."""

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
class Queued:
    """A job that Snakemake has submitted for a rule or a group, in squeue's words."""

    number: str
    state: str
    run_time: str
    nodes: str
    reason: str  # why it waits
    run: str  # the name that Snakemake gives to all its jobs
    directory: str
    comment: str  # rule_NAME, and _wildcards_... where the rule has some; NAME may be that of a group

    @property
    def rule(self) -> str:
        return self.comment.removeprefix("rule_").partition("_wildcards_")[0]

    @property
    def wildcards(self) -> str:
        return self.comment.partition("_wildcards_")[2]

    @property
    def waits(self) -> bool:
        return self.state == "PENDING"

    @property
    def about(self) -> str:
        if self.waits:
            return f"({self.reason})"
        return f"{self.run_time} on {self.nodes} node{'s' if self.nodes != '1' else ''}"


def queued() -> list[Queued]:
    """The jobs of this user's workflows that are not over; `slurm.NoAnswer`."""
    said = slurm.ask("squeue", "--me", "--noheader", "--format=%i|%T|%M|%D|%r|%j|%Z|%k")
    rows = (line.strip().split("|", 7) for line in said.splitlines())
    jobs = [Queued(*row) for row in rows if len(row) == 8]
    return [job for job in jobs if job.comment.startswith("rule_") and job.state not in OVER]


def queued_in(directory: Path) -> list[Queued]:
    """The jobs of the workflow in `directory` that are not over; `slurm.NoAnswer`."""
    return [job for job in queued() if Path(job.directory) == directory]


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
