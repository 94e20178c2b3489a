"""Whether a job is over, and how it ended: from its own record and what squeue says.

Neither needs accounting, and either may be missing: a record, where a job was killed; an answer of squeue,
where the controller is away, or has forgotten the job.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from snaketron.executor.records import Record, why_in_log
from snaketron.jobs.queue import OVER

Verdict = Literal["waits or runs", "succeeded", "failed"]

ABSENT = "absent"  # the state of a job that squeue does not list
# Slurm may show these for a moment before it puts the job back into the queue.
_MAY_BE_REQUEUED = {ABSENT, "NODE_FAIL", "PREEMPTED", "BOOT_FAIL"}


def verdict(state: str | None, record: Record | None, seconds: float, patience: float) -> Verdict:
    """Whether a job is over.

    Args:
        state: what squeue says of it; `ABSENT` where it does not list the job, None where it does not answer.
        record: what the job said; None before it has begun.
        seconds: for how long squeue has said so.
        patience: seconds for a shared file system to show the last record of a job.
    """
    if record and record.status == 0:
        return "succeeded"  # even if nobody answers: its command ended, and its files are there
    if state is None or (state != ABSENT and state not in OVER):
        return "waits or runs"
    if state == "COMPLETED":
        return "succeeded"
    said = record is not None and record.status is not None
    if state in _MAY_BE_REQUEUED and not said and seconds < patience:
        return "waits or runs"
    return "failed"


def explanation(state: str, record: Record | None, log: Path, by: str | None) -> str:
    """How a failed job ended, as the end of a sentence that begins with the job.

    `log` is the log of the job, and `by` the one who cancelled it, if that is known.
    """
    noted = why_in_log(log)
    if state == ABSENT and not (record and record.status is not None) and noted is not None:
        state = _NOTED.get(noted, "CANCELLED")
    if state == "CANCELLED":
        who = f"by {by}" if by else "(by whom, only Slurm's accounting would know)"
        return f"was cancelled {who}" + ("" if record else " before it began")
    if state in _ENDED:
        return _ENDED[state]
    if record and record.status is not None:
        return "failed" if record.status == 1 else f"failed with status {record.status}"
    if state != ABSENT:
        return f"failed (in Slurm's words: {state})"
    if record:
        return "was killed: it left no exit status, and Slurm does not know it any more"
    return "is not known to Slurm any more and never began: it was cancelled, or the controller has lost it"


_NOTED = {"TIME LIMIT": "TIMEOUT", "NODE FAILURE": "NODE_FAIL", "PREEMPTION": "PREEMPTED"}
_ENDED = {
    "TIMEOUT": "reached its time limit (`runtime` in the profile)",
    "OUT_OF_MEMORY": "needed more memory than it had asked for (`mem_mb` in the profile)",
    "NODE_FAIL": "lost its node, and Slurm has not requeued it",
    "PREEMPTED": "was pre-empted, and Slurm has not requeued it",
}
