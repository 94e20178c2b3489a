"""What a cluster does to a training: take its nodes or its time away, be away itself, or be asked twice."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

from tests.conftest import Workspace
from tests.slurm.conftest import MINUTES, Slurm, disturb, wait_for
from tests.slurm.disturbed import Disturbed, state_of

import psutil
import pytest


def is_pending(number: signal.Signals, process: psutil.Process) -> bool:
    """Whether a suspended process will get a signal as soon as it goes on."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    masks = re.findall(r"^(?:SigPnd|ShdPnd):\s*(\w+)$", status, re.MULTILINE)
    return any(int(mask, 16) >> (number - 1) & 1 for mask in masks)


@pytest.fixture(scope="module")
def told(slurm: Slurm, two_processes: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Disturbed:
    """A training is pre-empted as its processes start, pre-empted again, and then reaches its time limit.

    It saves only when it is told. That of the limit comes 150 s after each start of its job, of ten minutes:
    the start of a job and two steps take 15 s on an idle machine, and more than 75 s beside other tests.
    """
    disturbed = disturb(slurm, two_processes, tmp_path_factory.mktemp("told"))
    config = (f"sft={{save_interval: 1000, stop_before_limit: {60 * MINUTES - 150}}}",)
    with disturbed.start(config, "--set-resources", "sft:slurm_partition=low") as running:
        wait_for(lambda: len(disturbed.ranks()) == 2)
        disturbed.pre_empt()
        wait_for(lambda: disturbed.outcomes[0] is not None)
        # so that there is something left to do then
        with disturbed.suspended(1, step=3, attempt=2) as (process,):
            disturbed.pre_empt()
            # Slurm wakes what it tells to end.
            wait_for(lambda: state_of(process) != psutil.STATUS_STOPPED)
        with disturbed.suspended(0, step=5, attempt=3) as (process,):
            wait_for(lambda: is_pending(signal.SIGUSR1, process))
        assert running.result().status == 0
    return disturbed


def test_a_pre_empted_job_saves_and_goes_on_later(told: Disturbed):
    """It has a few seconds, and must not end by itself, which Slurm would count as a failure.

    The first time its processes only just start, and have nothing to save.
    """
    assert told.outcomes[:2] == ["stopped", "stopped"] and told.outcomes[-1] == "finished"
    assert told.job.restarts == len(told.attempts) - 1 and len(told.jobs) == 1
    assert told.attempts[2]["from_iteration"] >= 3  # saved when it was told
    told.is_undisturbed()


def test_a_time_limit_ends_a_job_and_not_the_training(told: Disturbed):
    """A job that reaches its time limit is queued again and goes on. No step is lost."""
    third, fourth, *_ = told.attempts[2:]
    assert third["outcome"] == "time limit" and 5 <= third["iteration"] < 10
    assert fourth["from_iteration"] == third["iteration"]
    assert told.job.restarts >= 3 and len(told.jobs) == 1
    assert "before the time limit; job" in (told.version / "train.log").read_text()
    told.is_undisturbed()


@pytest.fixture(scope="module")
def weathered(
    slurm: Slurm, two_processes: Workspace, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Disturbed, str]:
    """A training that stays in one job while the controller is away, a node is lost, and the job is requeued.

    With what it had said when the node came back.
    """
    disturbed = disturb(slurm, two_processes, tmp_path_factory.mktemp("weathered"))
    with disturbed.start() as running:
        with disturbed.suspended(0, step=1):
            slurm.kill_controller()
            try:
                time.sleep(30)  # Snakemake asks every second here, and nobody answers
                assert running.process.poll() is None
            finally:
                slurm.start_controller()
        with disturbed.suspended(1, step=5):  # else it would end before Slurm notices
            slurm.kill_node("node2")
            wait_for(lambda: disturbed.job.state == "PENDING" and disturbed.job.restarts == 1)
        slurm.start_node("node2")
        ranks = disturbed.wait_for(5, attempt=2)
        said = (disturbed.version / "train.log").read_text()
        # A write is short, and its first file is there for less of it than its directory.
        for begun, seconds in ((".iter_0000008.*.partial", 0.005), (".iter_0000008.*.partial/*", 0.001)):
            while not any(disturbed.version.glob(begun)):
                ranks[0].resume()
                time.sleep(seconds)
                ranks[0].suspend()
        slurm.scontrol("requeue", str(disturbed.job.id))
        assert running.result().status == 0
    assert len(disturbed.attempts) == 3
    return disturbed, said


def test_a_controller_that_is_away_for_a_while_is_waited_for(weathered: tuple[Disturbed, str]):
    """Nothing is submitted again, and the Snakemake that got no answer notices the end of its job."""
    disturbed, _ = weathered
    assert [job.state for job in disturbed.jobs] == ["COMPLETED"]
    assert "Slurm answers again, after " in disturbed.running.log.read_text()
    disturbed.is_undisturbed()


def test_a_lost_node_stops_one_attempt_and_its_processes_write_nothing_more(
    weathered: tuple[Disturbed, str],
):
    """The daemon of node2 dies. Its process lives on, unnoticed, and comes back when the job runs again."""
    disturbed, said = weathered
    assert len(disturbed.jobs) == 1
    assert disturbed.attempts[1]["from_iteration"] in (4, 8)
    assert f"Slurm requeues (a node was lost or taken down, say) job {disturbed.job.id}, which then" in said
    assert "run the same command again" not in said
    disturbed.is_undisturbed()


def test_a_requeue_inside_a_checkpoint_write_goes_on_from_the_one_before(weathered: tuple[Disturbed, str]):
    disturbed, _ = weathered
    assert disturbed.job.restarts == 2 and disturbed.job.state == "COMPLETED"
    # Ended at once, it has step 4 or 8; else it ends the write, does the step after it, and saves that.
    assert disturbed.attempts[2]["from_iteration"] in (4, 8, 9)
    disturbed.is_undisturbed()


def test_a_second_snakemake_waits_for_the_job_that_the_first_one_left(disturbed: Disturbed):
    """It publishes what that job trained, by a job that finds the training finished."""
    with disturbed.start() as running, disturbed.suspended(0, step=2) as (process,):
        first = disturbed.job.id
        os.killpg(running.process.pid, signal.SIGKILL)
        running.process.wait()
        with disturbed.start() as second:
            wait_for(lambda: disturbed.job.id != first and disturbed.job.reason == "Dependency", 180)
            process.resume()
            assert second.result().status == 0
    assert [job.state for job in disturbed.jobs] == ["COMPLETED", "COMPLETED"]
    assert disturbed.outcomes == ["finished"]
    disturbed.is_undisturbed()
