"""What goes wrong with a job or its processes: a training ends as an undisturbed one, or with its error."""

from __future__ import annotations

import os

from tests.conftest import Workspace
from tests.slurm.conftest import Slurm, disturb, wait_for
from tests.slurm.disturbed import Disturbed, state_of

import psutil
import pytest


@pytest.fixture(scope="module")
def thrice(slurm: Slurm, two_processes: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Disturbed:
    """A training that loses a process, then hangs, and whose job is cancelled then; it ends all the same."""
    disturbed = disturb(slurm, two_processes, tmp_path_factory.mktemp("thrice"))
    with disturbed.start(("sft={step_timeout: 60}",)) as running:
        with disturbed.suspended(1, step=5) as (process,):
            process.kill()
        with disturbed.suspended(0, step=5, attempt=2) as (process,):
            wait_for(lambda: state_of(process) == psutil.STATUS_DEAD)
        with disturbed.suspended(1, step=5, attempt=3):
            disturbed.slurm.scancel(str(disturbed.job.id))
        assert running.result().status == 0
    assert len(disturbed.attempts) == 4
    return disturbed


def test_a_process_that_dies_is_replaced_within_the_job(thrice: Disturbed):
    first, second, *_ = thrice.attempts
    assert first["outcome"] == "failed" and "was killed by SIGKILL" in first["error"]
    assert second["from_iteration"] in (4, 8)
    assert second["job"] == first["job"]
    thrice.is_undisturbed()


def test_processes_that_hang_are_replaced_within_the_job(thrice: Disturbed):
    _, second, third, _ = thrice.attempts
    assert second["outcome"] == "hung"
    assert "rank 0 says nothing; rank 1 after step " in second["error"]  # it was suspended
    assert third["from_iteration"] in (4, 8)
    assert third["job"] == second["job"]
    thrice.is_undisturbed()


def test_a_cancelled_job_is_submitted_again(thrice: Disturbed):
    assert [(job.state, job.restarts) for job in thrice.jobs] == [("CANCELLED", 0), ("COMPLETED", 0)]
    assert [attempt["job"] for attempt in thrice.attempts[2:]] == [str(job.id) for job in thrice.jobs]
    assert thrice.attempts[-1]["from_iteration"] >= 4 and thrice.attempts[-1]["outcome"] == "finished"
    thrice.is_undisturbed()


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
