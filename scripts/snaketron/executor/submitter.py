"""How a job gets into Slurm's queue: again where Slurm could not take it, and after what was left behind."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from snaketron.jobs import slurm
from snaketron.jobs.queue import Queued, queued, queued_in

from snakemake_executor_plugin_slurm.utils import get_job_wildcards

PAUSE_S = 10.0  # between two tries
AWAY_S = 600.0  # for the controller to come back
SOON_S = 1.0  # after a signal to the whole group of processes, for Snakemake to stop
SILENT = "ended without a word"  # as one that is killed does
# What Slurm's commands say where nothing is wrong with the job.
_AWAY = re.compile(
    "unable to contact slurm controller|timed out|no answer within|zero bytes were transmitted"
    "|connection refused|unexpected message received|backup controller|temporarily|try again"
    f"|{SILENT}|exit status -",
    re.IGNORECASE,
)
_FULL = re.compile("(Max|Grp)Submit")  # limits of submitted jobs, as in AssocMaxSubmitJobLimit
# sbatch did not hear whether the job was taken.
_MAY_BE_IN = re.compile(f"^sbatch: .*(timed out|zero bytes|{SILENT})", re.IGNORECASE)


def title(job: Any) -> str:
    """The name of a job or of a group of jobs, with its wildcards.

    A group is named after its rules, as `group tokens (8 jobs)`.
    """
    if job.is_group():
        return f"group {job.groupid} ({len(job.jobs)} jobs)"
    wildcards = ", ".join(f"{name}={value}" for name, value in job.wildcards_dict.items())
    return f"rule {job.rule.name}" + (f" ({wildcards})" if wildcards else "")


def comment(job: Any) -> str:
    """The comment that the plugin gives to the Slurm job."""
    wildcards = get_job_wildcards(job)
    return f"rule_{job.name}" + (f"_wildcards_{wildcards}" if wildcards else "")


def said(message: str) -> str:
    """What sbatch said, in one line, from the plugin's message: that repeats the whole command after it."""
    quoted = re.search(r"The error message was '(.*?)'\.\n", message, re.DOTALL)
    lines = [line.strip() for line in (quoted[1] if quoted else message).splitlines()]
    lines = [re.sub("^sbatch: (error: )?(Batch job submission failed: )?", "", line) for line in lines]
    return "; ".join(dict.fromkeys(line.rstrip(".") for line in lines if line))


class Submitter:
    """Submits the jobs of the run `name`, one at a time, from `directory`."""

    def __init__(self, name: str, directory: Path, logger: Any) -> None:
        self.name, self.directory, self.logger = name, directory, logger
        self.submitted: set[str] = set()  # numbers of this run's jobs
        self._errors: dict[Any, str] = {}  # by job, of the last try
        self._after: dict[Any, list[str]] = {}  # by job, the running ones that it waits for
        self._one = threading.Lock()
        self._stopping = threading.Event()
        self._others: list[Queued] | None = None  # left by an earlier Snakemake; None before it is known

    def stop(self) -> None:
        """Submit nothing more."""
        self._stopping.set()

    def failed(self, job: Any, message: str) -> None:
        """Called by the plugin when it could not submit a job."""
        self._errors[job] = message

    def dependency(self, job: Any) -> str:
        """The option of sbatch that lets a job wait for those that would write the same files."""
        after = self._after.get(job)
        return f" --dependency=afterany:{':'.join(after)}" if after else ""

    def submit(self, job: Any, try_to: Callable[[], None]) -> str | None:
        """Submit a job by `try_to`; None when it is done, else why Slurm refuses the job."""
        began, told, may_be_in = time.monotonic(), False, False
        while not self._stopping.is_set():
            with self._one:
                if self._stopping.is_set():  # while another job was submitted
                    break
                refusal = self._try(job, try_to, may_be_in)
            if refusal is None:
                return None
            may_be_in = may_be_in or bool(_MAY_BE_IN.search(refusal))
            away = _AWAY.search(refusal) and time.monotonic() < began + AWAY_S
            if not (away or _FULL.search(refusal)):
                return refusal
            if not told and not self._stopping.wait(SOON_S):
                self.logger.warning(f"{title(job)} waits to be submitted: {refusal}.")
                told = True
            self._stopping.wait(PAUSE_S)
        return None

    def _try(self, job: Any, try_to: Callable[[], None], may_be_in: bool) -> str | None:
        """Submit a job once; None when it is done, else what was said."""
        try:
            if may_be_in:
                self._withdraw(comment(job))
            self._after[job] = self._clear_the_way(comment(job))
        except slurm.NoAnswer as error:
            return str(error)
        self._errors.pop(job, None)
        try_to()
        message = self._errors.pop(job, None)
        return None if message is None else f"sbatch: {said(message) or SILENT}"

    def _withdraw(self, named: str) -> None:
        """Cancel jobs that Slurm took although sbatch did not hear of it; `slurm.NoAnswer`."""
        for other in queued():
            if (other.run, other.comment) == (self.name, named) and other.number not in self.submitted:
                slurm.ask("scancel", other.number)

    def _clear_the_way(self, named: str) -> list[str]:
        """The jobs with this comment that an earlier Snakemake left running; those that wait are cancelled.

        Two jobs of one rule and wildcards would write the same files. Raises `slurm.NoAnswer`.
        """
        if self._others is None or any(other.comment == named for other in self._others):
            known = self._others is not None
            self._others = [job for job in queued_in(self.directory) if job.run != self.name]
            if self._others and not known:
                numbers = ", ".join(other.number for other in self._others)
                self.logger.warning(
                    f"Slurm jobs of an earlier Snakemake are still here: {numbers}. A job of the same rule "
                    "and wildcards replaces one that waits, and waits for one that runs; scancel what you do "
                    "not want to wait for."
                )
        same = [other for other in self._others if other.comment == named]
        for other in same:
            if other.waits:
                slurm.ask("scancel", "--state=PENDING", other.number)
        return [other.number for other in same]
