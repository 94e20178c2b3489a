"""What is done when sbatch does not take a job, and when an earlier Snakemake left one behind."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from types import SimpleNamespace

from snaketron.executor import submitter
from snaketron.executor.submitter import Submitter, said

import pytest


class Job:
    """A job of Snakemake, for one shard."""

    name, wildcards, wildcards_dict = "tokens", ["a"], {"shard": "a"}
    rule = SimpleNamespace(name="tokens")

    def is_group(self) -> bool:
        return False


JOB = Job()
HERE = Path("/data/work")


def line(number: int, state: str, run: str, comment: str, directory: Path | str = HERE) -> str:
    """What squeue says of a job."""
    return f"{number}|{state}|0:00|1|None|{run}|{directory}|{comment}"


def refusal(*lines: str) -> str:
    """A refusal in the words of the plugin."""
    text = "\n".join(f"sbatch: error: {line}" for line in lines)
    return f"SLURM sbatch failed. The error message was '{text}'.\n    sbatch call:\n        sbatch {{'a'}}\n"


INVALID = "Batch job submission failed: Invalid account or account/partition combination specified"
AWAY = "Batch job submission failed: Unable to contact slurm controller (connect failure)"
TIMED_OUT = "Batch job submission failed: Socket timed out on send/recv operation"
FULL = (
    "AssocMaxSubmitJobLimit",
    "Batch job submission failed: Job violates accounting/QOS policy (job submit limit)",
)


class Slurm:
    """Answers of squeue and sbatch, in order; and the commands that cancelled something."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, queue: list[str], *refusals: str) -> None:
        self.queue, self.refusals = queue, list(refusals)
        self.cancelled: list[tuple[str, ...]] = []
        self.asked_for: list[str] = []
        self.submitter = Submitter("run", HERE, logging.getLogger("test"))
        monkeypatch.setattr(submitter.slurm, "ask", self.ask)
        monkeypatch.setattr(submitter, "PAUSE_S", 0)
        monkeypatch.setattr(submitter, "SOON_S", 0)

    def ask(self, *command: str, seconds: float = 0) -> str:
        if command[0] == "squeue":
            return "\n".join(self.queue)
        self.cancelled.append(command[1:])
        return ""

    def sbatch(self) -> None:
        self.asked_for.append(self.submitter.dependency(JOB))
        if self.refusals:
            self.submitter.failed(JOB, self.refusals.pop(0))

    def submit(self) -> str | None:
        return self.submitter.submit(JOB, self.sbatch)


def test_what_sbatch_said_is_one_line():
    assert said(refusal(INVALID)) == "Invalid account or account/partition combination specified"
    assert (
        said(refusal(*FULL))
        == "AssocMaxSubmitJobLimit; Job violates accounting/QOS policy (job submit limit)"
    )
    assert said("Job submission failed with exception: no") == "Job submission failed with exception: no"


def test_a_refused_job_is_submitted_once(monkeypatch: pytest.MonkeyPatch):
    slurm = Slurm(monkeypatch, [], refusal(INVALID), refusal(INVALID))
    assert slurm.submit() == "sbatch: Invalid account or account/partition combination specified"
    assert len(slurm.asked_for) == 1


@pytest.mark.parametrize("lines", [(AWAY,), (TIMED_OUT,), FULL])
def test_a_job_that_slurm_cannot_take_now_is_submitted_again(monkeypatch: pytest.MonkeyPatch, lines):
    slurm = Slurm(monkeypatch, [], refusal(*lines), refusal(*lines))
    assert slurm.submit() is None
    assert len(slurm.asked_for) == 3


def test_a_controller_that_does_not_come_back_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(submitter, "AWAY_S", 0)
    assert (
        Slurm(monkeypatch, [], refusal(AWAY)).submit()
        == "sbatch: Unable to contact slurm controller (connect failure)"
    )


@pytest.mark.parametrize("lines", [[TIMED_OUT], []])
def test_a_job_that_slurm_took_unheard_is_not_submitted_twice(monkeypatch: pytest.MonkeyPatch, lines):
    """An sbatch that is killed says nothing: Ctrl-C, and SIGTERM to a service, are for all its processes.

    Job 8 is known, 9 is of other wildcards, 10 is the one that was taken, 11 is of another run.
    """
    queue = [
        line(8, "RUNNING", "run", "rule_tokens_wildcards_a"),
        line(9, "PENDING", "run", "rule_tokens_wildcards_b"),
        line(10, "PENDING", "run", "rule_tokens_wildcards_a"),
        line(11, "PENDING", "another", "rule_tokens_wildcards_a", "/data/elsewhere"),
    ]
    slurm = Slurm(monkeypatch, queue, refusal(*lines))
    slurm.submitter.submitted.add("8")
    assert slurm.submit() is None
    assert slurm.cancelled == [("10",)]


def test_a_job_replaces_a_waiting_one_of_an_earlier_run_and_waits_for_a_running_one(
    monkeypatch: pytest.MonkeyPatch,
):
    queue = [
        line(3, "RUNNING", "earlier", "rule_tokens_wildcards_a"),
        line(4, "PENDING", "earlier", "rule_tokens_wildcards_a"),
        line(5, "RUNNING", "earlier", "rule_tokens_wildcards_b"),
        line(6, "RUNNING", "earlier", "rule_tokens_wildcards_a", "/data/elsewhere"),
        line(7, "RUNNING", "mine", "something by hand"),
        line(8, "RUNNING", "run", "rule_tokens_wildcards_a"),
    ]
    slurm = Slurm(monkeypatch, queue)
    assert slurm.submit() is None
    assert slurm.cancelled == [("--state=PENDING", "4")]
    assert slurm.asked_for == [" --dependency=afterany:3:4"]


def test_nothing_is_submitted_after_a_stop(monkeypatch: pytest.MonkeyPatch):
    slurm = Slurm(monkeypatch, [])
    slurm.submitter.stop()
    assert slurm.submit() is None
    assert slurm.asked_for == []


def test_nothing_is_submitted_that_waits_for_another_submission_when_the_stop_comes(
    monkeypatch: pytest.MonkeyPatch,
):
    slurm = Slurm(monkeypatch, [])
    began, may_end = threading.Event(), threading.Event()

    def slow_sbatch() -> None:
        slurm.sbatch()
        began.set()
        assert may_end.wait(300)

    first = threading.Thread(target=slurm.submitter.submit, args=(JOB, slow_sbatch))
    second = threading.Thread(target=slurm.submit)
    first.start()
    assert began.wait(300)
    second.start()
    time.sleep(0.2)  # for it to come to where it waits
    slurm.submitter.stop()
    may_end.set()
    for thread in (first, second):
        thread.join(300)
    assert len(slurm.asked_for) == 1
