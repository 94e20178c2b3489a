"""What goes wrong with trainings on a cluster: each ends as an undisturbed one, or with a clear error."""

from __future__ import annotations

import os
import signal
import subprocess
import time

from tests.end_to_end.test_kill import weights
from tests.slurm.conftest import wait_for
from tests.slurm.disturbed import Disturbed

import psutil


def test_a_time_limit_ends_a_job_and_not_the_training(disturbed: Disturbed):
    """Told 25 s after its start, of a limit of five minutes; the same job goes on. No step is lost."""
    with disturbed.start(("sft={stop_before_limit: 275}",)) as running:
        disturbed.wait_for(2)
        with disturbed.suspended(0):  # so that there is something left to do then
            wait_for(lambda: run_time(disturbed) > 27, 60)
        assert running.result().status == 0
    assert disturbed.job.restarts >= 1 and len(disturbed.jobs) == 1
    first, second, *_ = disturbed.attempts
    assert first["outcome"] == "time limit" and 2 <= first["iteration"] < 10
    assert second["from_iteration"] == first["iteration"]
    assert "before the time limit; job" in (disturbed.version / "train.log").read_text()
    disturbed.is_undisturbed()


def run_time(disturbed: Disturbed) -> float:
    """Seconds since the job began to run."""
    minutes, seconds = disturbed.slurm.call("squeue", "-h", f"-j{disturbed.job.id}", "-o%M").split(":")
    return int(minutes) * 60 + int(seconds)


def test_a_cancelled_job_is_submitted_again(disturbed: Disturbed):
    with disturbed.start() as running:
        disturbed.wait_for(5)
        disturbed.slurm.scancel(str(disturbed.job.id))
        assert running.result().status == 0
    assert [job.state for job in disturbed.jobs] == [
        "CANCELLED",
        "COMPLETED",
    ]
    assert disturbed.attempts[-1]["from_iteration"] >= 4
    disturbed.is_undisturbed()


def test_a_process_that_dies_is_replaced_within_the_job(disturbed: Disturbed):
    with disturbed.start() as running:
        disturbed.wait_for(5)
        disturbed.ranks()[1].kill()
        assert running.result().status == 0
    assert disturbed.outcomes == ["failed", "finished"]
    assert "was killed by SIGKILL" in disturbed.attempts[0]["error"]
    assert disturbed.attempts[1]["from_iteration"] in (4, 8)
    assert disturbed.job.restarts == 0
    disturbed.is_undisturbed()


def test_processes_that_hang_are_replaced_within_the_job(disturbed: Disturbed):
    with disturbed.start(("sft={step_timeout: 30}",)) as running:
        disturbed.wait_for(5)
        with disturbed.suspended(0) as (process,):
            wait_for(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, 90)
        assert running.result().status == 0
    assert disturbed.outcomes == ["hung", "finished"]
    assert disturbed.attempts[1]["from_iteration"] in (4, 8)
    disturbed.is_undisturbed()


def test_a_requeue_inside_a_checkpoint_write_goes_on_from_the_one_before(disturbed: Disturbed):
    with disturbed.start() as running:
        disturbed.wait_for(4)
        ranks = disturbed.ranks()
        wait_for(lambda: any(disturbed.version.glob(".iter_0000008.*.partial/*")), 120, every=0.001)
        ranks[0].suspend()
        disturbed.slurm.scontrol("requeue", str(disturbed.job.id))
        assert running.result().status == 0
    assert disturbed.job.restarts == 1 and disturbed.job.state == "COMPLETED"
    assert disturbed.attempts[-1]["from_iteration"] in (4, 8)
    disturbed.is_undisturbed()


def test_a_pre_empted_job_saves_and_goes_on_later(disturbed: Disturbed):
    """It has a few seconds, and must not end by itself, which Slurm would count as a failure."""
    with disturbed.start(
        ("sft={save_interval: 1000}",), "--set-resources", "sft:slurm_partition=low"
    ) as running:
        disturbed.wait_for(3)
        with disturbed.suspended(1) as (process,):  # so that there is something left to do then
            high = subprocess.run(
                ["sbatch", "--parsable", "-phigh", "-Atests", "-N2", "--exclusive", "--wrap=sleep 2"],
                env=disturbed.slurm.environment(),
                cwd=disturbed.workspace.path.parent,
                capture_output=True,
                text=True,
                check=True,
            )
            assert high.stdout.strip().isdigit()
            # Slurm wakes what it tells to end.
            wait_for(lambda: process.status() != psutil.STATUS_STOPPED, 60)
        assert running.result().status == 0
    assert disturbed.job.restarts == 1 and len(disturbed.jobs) == 1
    assert disturbed.attempts[-1]["from_iteration"] >= 3  # saved when it was told
    assert weights(disturbed.published) == weights(disturbed.undisturbed)


def test_a_lost_node_stops_one_attempt_and_its_processes_write_nothing_more(disturbed: Disturbed):
    """The daemon of node2 dies. Its process lives on, unnoticed, and comes back when the job runs again."""
    slurm = disturbed.slurm
    with disturbed.start() as running:
        disturbed.wait_for(5)
        with disturbed.suspended(1):  # else it would end before Slurm notices
            slurm.kill_node("node2")
            wait_for(lambda: disturbed.job.state == "PENDING" and disturbed.job.restarts == 1, 90)
        slurm.start_node("node2")
        assert running.result().status == 0
    assert len(disturbed.jobs) == 1
    assert disturbed.attempts[-1]["from_iteration"] in (4, 8)
    disturbed.is_undisturbed()


def test_a_run_that_fails_the_same_way_again_stops_with_its_error(disturbed: Disturbed):
    """A pack is damaged after it was made: nothing is published, and no GPU hour spent on more attempts."""
    packs = sorted((disturbed.workspace.path / "data/sft/train").rglob("*.parquet"))
    for pack in packs:
        before = pack.stat()
        content = bytearray(pack.read_bytes())
        content[100:400] = bytes(300)
        pack.write_bytes(content)
        os.utime(pack, (before.st_atime, before.st_mtime))
    with disturbed.start() as running:
        result = running.result()
    assert result.status != 0 and not disturbed.published.exists()
    assert len(disturbed.attempts) <= 2 and disturbed.attempts[-1]["gave_up"]
    assert (
        "error: " in result.output
        and "Traceback (most recent call last)" not in result.output.split("error:")[-1]
    )
    assert {job.state for job in disturbed.jobs} == {"FAILED"}


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


def test_a_second_snakemake_does_not_disturb_the_job_that_the_first_one_left(disturbed: Disturbed):
    with disturbed.start() as running:
        disturbed.wait_for(2)
        first = disturbed.job.id
        with disturbed.suspended(0):
            os.killpg(running.process.pid, signal.SIGKILL)
            running.process.wait()
            second = disturbed.slurm.run(disturbed.workspace, "ckpt/sft", "--retries", "0")
        assert second.status != 0 and f"Slurm job {first} is training here" in second.output
        wait_for(lambda: (disturbed.version / "record.json").exists(), 120)
        wait_for(lambda: not disturbed.ranks())
        time.sleep(3)
    third = disturbed.slurm.run(disturbed.workspace, "ckpt/sft")
    assert third.status == 0, third.output[-3000:]
    disturbed.is_undisturbed()
