"""Where the jobs of a working directory stand: a line a job, with the progress of trainings."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from snaketron.jobs import heartbeat, queue, slurm
from snaketron.jobs.owner import Holder
from snaketron.jobs.version import versions
from snaketron.log import UserError

FEW = 8  # more jobs of one rule in one state are counted on one line


def lines(directory: Path, ckpt: Path) -> list[str]:
    """A line for each Slurm job of the workflow in `directory`, or one for many of a rule and state.

    `ckpt` is the root of the checkpoints. Raises `slurm.NoAnswer`.
    """
    progress = _progress(ckpt)
    by_kind: dict[tuple[str, str], list[str]] = {}
    for job in queue.queued_in(directory):
        title = f"{job.rule} {job.wildcards}".strip()
        said = progress.get(job.number, "")
        line = f"{title:32} job {job.number:<10} {job.state:10} {job.about}  {said}".rstrip()
        by_kind.setdefault((job.rule, job.state), []).append(line)
    found = []
    for (rule, state), same in sorted(by_kind.items()):
        found += same if len(same) <= FEW else [f"{rule:32} {len(same)} jobs {state}"]
    return found


def report_every(seconds: float, directory: Path, ckpt: Path, say: Callable[[str], None]) -> threading.Thread:
    """Say the lines whenever they have changed, in a thread that ends with the process."""

    def report() -> None:
        said: list[str] = []
        while True:
            time.sleep(seconds)
            try:
                now = lines(directory, ckpt)
            except (slurm.NoAnswer, OSError):
                continue  # the controller is busy; Snakemake itself asks it as well
            except UserError as error:  # a file of a training has another content
                now = [str(error)]
            if now and now != said:
                say("\n".join(now))
            said = now

    thread = threading.Thread(target=report, name="status", daemon=True)
    thread.start()
    return thread


def _progress(ckpt: Path) -> dict[str, str]:
    """How far trainings are, in their own words, by the number of their Slurm job."""
    found = {}
    for version in versions(ckpt):
        holder, beat = Holder.of(version), heartbeat.read(version.heartbeat)
        if holder and holder.job and beat:
            found[holder.job] = heartbeat.sentence(beat)
    return found
