"""What Slurm is asked, and what a job asks about itself and others; no answer counts as None or as no."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from dataclasses import dataclass

TIMEOUT_S = 60.0  # for a busy controller to answer
# States in which the processes of a job may be alive.
ALIVE = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "CONFIGURING"}
QUEUED = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"}


class NoAnswer(Exception):
    """A command of Slurm failed, or did not end in time."""

    def __init__(self, said: str, last: str = "") -> None:
        super().__init__(said)
        self.last = last or said  # its last line: where there are several, those before say what led to it


def ask(*command: str, seconds: float = TIMEOUT_S) -> str:
    """What a command of Slurm prints; `NoAnswer` with its error.

    Ctrl-C in a terminal is for the process that asks, and not for the command, which may be cancelling jobs.
    """
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
            process_group=0,
        )
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"{command[0]}: no answer within {seconds:.0f} s") from None
    except FileNotFoundError:
        raise NoAnswer(f"{command[0]}: no such command") from None
    except OSError as error:
        raise NoAnswer(f"{command[0]}: {(error.strerror or str(error)).lower()}") from None
    if done.returncode:
        lines = [" ".join(line.split()) for line in done.stderr.splitlines() if line.strip()]
        lines = [re.sub(f"^{command[0]}: (error|fatal): ", "", line) for line in lines]
        lines = lines or [f"exit status {done.returncode}"]
        raise NoAnswer(f"{command[0]}: {' '.join(lines)}", f"{command[0]}: {lines[-1]}")
    return done.stdout


@dataclass(frozen=True)
class Job:
    """The Slurm job that this process is in."""

    id: str
    of_rule: bool  # Snakemake submitted it for one rule, so it may be requeued; else it is the user's
    restarts: int = 0  # how often Slurm has requeued it


def current_job() -> Job | None:
    if not (number := os.environ.get("SLURM_JOB_ID")):
        return None
    # The executor plugin writes the rule into the comment.
    of_rule = _squeue(number, "--format=%k").startswith("rule_")
    return Job(number, of_rule, _restarts(number))


def seconds_left(job: Job) -> float | None:
    """Seconds until the time limit of a job; None when there is no limit, or Slurm does not tell."""
    return parse_time(_squeue(job.id, "--format=%L"))


def is_preempted(job: Job) -> bool:
    """Whether Slurm has told a job to make room for another one, and ends it when its grace time is over."""
    return bool(re.match(r"\d{4}-", _squeue(job.id, "--Format=PreemptTime")))


def is_requeued(job: Job) -> bool:
    """Whether Slurm ends a job to run it again, as when a node of it was lost or taken down."""
    return _restarts(job.id) > job.restarts


def parse_time(text: str) -> float | None:
    """Seconds of a time as squeue writes it, such as 1-02:03:04 or 03:04; None for UNLIMITED and the like.

    >>> parse_time("1-02:03:04")
    93784.0
    """
    if not (match := re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)):
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def is_over(number: str) -> bool:
    """Whether Slurm says that a job does not run any more: then its processes are gone, or cut off."""
    try:
        return not _states(number) & ALIVE
    except NoAnswer:
        return False


def goes_on(number: str) -> bool:
    """Whether a job runs, or waits to be run again; `NoAnswer` where Slurm does not say."""
    return bool(_states(number) & {*ALIVE, *QUEUED})


def _states(number: str) -> set[str]:
    """The states of a job; none of one that Slurm has forgotten."""
    try:
        return set(ask("squeue", "--noheader", f"--jobs={number}", "--format=%T").split())
    except NoAnswer as error:
        if "Invalid job id" in str(error):
            return set()
        raise


def requeue(job: Job) -> bool:
    """Put a job back into the queue, to run again under the same number; it is then ended by Slurm."""
    try:
        ask("scontrol", "requeue", job.id)
    except NoAnswer:
        return False
    return True


def kill_steps(job: Job) -> None:
    """Kill what srun started in a job. A killed srun would leave its tasks behind."""
    with contextlib.suppress(NoAnswer):  # Slurm does so itself when the job ends
        listed = ask("squeue", "--steps", "--noheader", f"--jobs={job.id}", "--format=%i")
        steps = [step for step in listed.split() if step.rpartition(".")[2].isdigit()]
        if steps:
            ask("scancel", "--signal=KILL", *steps)


def _restarts(number: str) -> int:
    said = _squeue(number, "--Format=RestartCnt")
    return int(said) if said.isdigit() else 0


def _squeue(number: str, form: str) -> str:
    """What squeue says of a job in a form; empty where it does not answer."""
    try:
        return ask("squeue", "--noheader", f"--jobs={number}", form).strip()
    except NoAnswer:
        return ""
