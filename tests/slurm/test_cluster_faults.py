"""What a cluster does to a training: take its nodes away, be away itself, or be asked twice."""

from __future__ import annotations

import os
import signal
import time

from tests.end_to_end.test_kill import weights
from tests.slurm.conftest import wait_for
from tests.slurm.disturbed import Disturbed

import psutil


def test_a_pre_empted_job_saves_and_goes_on_later(disturbed: Disturbed):
    """It has a few seconds, and must not end by itself, which Slurm would count as a failure.

    The first time its processes only just start, and have nothing to save.
    """
    with disturbed.start(
        ("sft={save_interval: 1000}",), "--set-resources", "sft:slurm_partition=low"
    ) as running:
        wait_for(lambda: len(disturbed.ranks()) == 2)
        disturbed.pre_empt()
        wait_for(lambda: disturbed.outcomes[0] is not None)
        disturbed.wait_for(3)
        with disturbed.suspended(1) as (process,):  # so that there is something left to do then
            disturbed.pre_empt()
            # Slurm wakes what it tells to end.
            wait_for(lambda: process.status() != psutil.STATUS_STOPPED)
        assert running.result().status == 0
    assert disturbed.outcomes == ["stopped", "stopped", "finished"]
    assert disturbed.job.restarts == 2 and len(disturbed.jobs) == 1
    assert disturbed.attempts[-1]["from_iteration"] >= 3  # saved when it was told
    assert weights(disturbed.published) == weights(disturbed.undisturbed)


def test_a_requeue_inside_a_checkpoint_write_goes_on_from_the_one_before(disturbed: Disturbed):
    with disturbed.start() as running:
        disturbed.wait_for(4)
        ranks = disturbed.ranks()
        wait_for(lambda: any(disturbed.version.glob(".iter_0000008.*.partial/*")), every=0.001)
        ranks[0].suspend()
        disturbed.slurm.scontrol("requeue", str(disturbed.job.id))
        assert running.result().status == 0
    assert disturbed.job.restarts == 1 and disturbed.job.state == "COMPLETED"
    assert disturbed.attempts[-1]["from_iteration"] in (4, 8)
    disturbed.is_undisturbed()


def test_a_lost_node_stops_one_attempt_and_its_processes_write_nothing_more(disturbed: Disturbed):
    """The daemon of node2 dies. Its process lives on, unnoticed, and comes back when the job runs again."""
    slurm = disturbed.slurm
    with disturbed.start() as running:
        disturbed.wait_for(5)
        with disturbed.suspended(1):  # else it would end before Slurm notices
            slurm.kill_node("node2")
            wait_for(lambda: disturbed.job.state == "PENDING" and disturbed.job.restarts == 1)
        slurm.start_node("node2")
        assert running.result().status == 0
    assert len(disturbed.jobs) == 1
    assert disturbed.attempts[-1]["from_iteration"] in (4, 8)
    said = (disturbed.version / "train.log").read_text()
    assert f"Slurm requeues (a node was lost or taken down, say) job {disturbed.job.id}, which then" in said
    assert "run the same command again" not in said
    disturbed.is_undisturbed()


def test_a_controller_that_is_away_for_a_while_is_waited_for(disturbed: Disturbed):
    """Snakemake asks it every second here, and nobody answers for half a minute."""
    with disturbed.start() as running:
        disturbed.wait_for(1)
        with disturbed.suspended(0):
            disturbed.slurm.kill_controller()
            try:
                time.sleep(30)
                assert running.process.poll() is None
            finally:
                disturbed.slurm.start_controller()
        assert running.result().status == 0
    assert [job.state for job in disturbed.jobs] == ["COMPLETED"]
    disturbed.is_undisturbed()


def test_a_second_snakemake_waits_for_the_job_that_the_first_one_left(disturbed: Disturbed):
    """It publishes what that job trained, by a job that finds the training finished."""
    with disturbed.start() as running:
        disturbed.wait_for(2)
        first = disturbed.job.id
        with disturbed.suspended(0):
            os.killpg(running.process.pid, signal.SIGKILL)
            running.process.wait()
            with disturbed.start() as second:
                wait_for(lambda: disturbed.job.id != first and disturbed.job.reason == "Dependency", 180)
                disturbed.ranks()[0].resume()
                assert second.result().status == 0
    assert [job.state for job in disturbed.jobs] == ["COMPLETED", "COMPLETED"]
    assert disturbed.outcomes == ["finished"]
    disturbed.is_undisturbed()
