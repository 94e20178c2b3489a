"""When a job is over, and how it is said how it ended."""

from __future__ import annotations

from pathlib import Path

from snaketron.executor.records import Record
from snaketron.executor.verdict import ABSENT, explanation, verdict

import pytest

RUNS, SUCCEEDED, FAILED = "waits or runs", "succeeded", "failed"
BEGAN, WELL, BADLY = Record(), Record(status=0), Record(status=1)


@pytest.mark.parametrize(
    ("state", "record", "seconds", "expected"),
    [
        ("PENDING", None, 0, RUNS),
        ("RUNNING", BEGAN, 0, RUNS),
        ("COMPLETED", BEGAN, 0, SUCCEEDED),
        ("FAILED", BADLY, 0, FAILED),
        ("CANCELLED", None, 0, FAILED),
        # Nobody answers: a job that says that it succeeded is over, and no other.
        (None, WELL, 0, SUCCEEDED),
        (None, BADLY, 1000, RUNS),
        (None, BEGAN, 1000, RUNS),
        # Slurm has forgotten the job: its record says how it ended.
        (ABSENT, WELL, 0, SUCCEEDED),
        (ABSENT, BADLY, 0, FAILED),
        # Without a last word it was killed, unless a shared file system has yet to show the record.
        (ABSENT, BEGAN, 29, RUNS),
        (ABSENT, BEGAN, 30, FAILED),
        (ABSENT, None, 30, FAILED),
        # A failed command of a job that Slurm puts back into the queue: it runs again.
        ("PENDING", BADLY, 1000, RUNS),
        ("COMPLETING", BADLY, 1000, RUNS),
        # Slurm has not requeued it, and the job is over.
        ("NODE_FAIL", BEGAN, 0, RUNS),
        ("NODE_FAIL", BEGAN, 30, FAILED),
        ("PREEMPTED", BEGAN, 30, FAILED),
        # A state of another Slurm than this one.
        ("EXPEDITING", BEGAN, 1000, RUNS),
    ],
)
def test_a_job_is_over_when_its_record_or_slurm_says_so(state, record, seconds, expected):
    assert verdict(state, record, seconds, patience=30) == expected


@pytest.mark.parametrize(
    ("state", "record", "log", "by", "expected"),
    [
        ("CANCELLED", None, None, "ada", "was cancelled by ada before it began"),
        ("CANCELLED", BEGAN, None, None, "was cancelled (by whom, only Slurm's accounting would know)"),
        ("TIMEOUT", BEGAN, None, None, "reached its time limit (`runtime` in the profile)"),
        ("FAILED", BADLY, None, None, "failed"),
        ("FAILED", Record(status=137), None, None, "failed with status 137"),
        ("BOOT_FAIL", None, None, None, "failed (in Slurm's words: BOOT_FAIL)"),
        (ABSENT, BADLY, None, None, "failed"),
        (ABSENT, BEGAN, " DUE TO TIME LIMIT", None, "reached its time limit (`runtime` in the profile)"),
        (ABSENT, BEGAN, " DUE TO NODE FAILURE, SEE", None, "lost its node, and Slurm has not requeued it"),
        (ABSENT, BEGAN, "", "ada", "was cancelled by ada"),
        (
            *(ABSENT, BEGAN, None, None),
            "was killed: it left no exit status, and Slurm does not know it any more",
        ),
        (
            *(ABSENT, None, None, None),
            "is not known to Slurm any more and never began: it was cancelled, or the controller has lost it",
        ),
    ],
)
def test_how_a_job_ended_is_said_by_slurm_its_record_or_its_log(
    tmp_path: Path, state, record, log, by, expected
):
    path = tmp_path / "7.log"
    if log is not None:
        path.write_text(f"slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-28T18:34:32{log} ***\n")
    assert explanation(state, record, path, by) == expected
