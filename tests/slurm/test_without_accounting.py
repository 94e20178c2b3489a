"""A cluster without accounting that forgets jobs 10 s after their end, and all that goes wrong on it."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import POLLING, REPOSITORY, Workspace
from tests.end_to_end.processes import Forked
from tests.slurm.conftest import Job, Running, Slurm, Submitting, started, wait_for

import pytest


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with started(tmp_path_factory.mktemp("plain"), "plain") as found:
        yield found


@contextlib.contextmanager
def meeting(plain: Slurm, directory: Path, *fates: str, before: tuple[str, ...] = ()) -> Iterator[Running]:
    """Snakemake, started as `before` says, making the toys that meet these fates."""
    directory.mkdir(exist_ok=True)
    workspace = Submitting(directory)
    command = [POLLING, "--snakefile", str(REPOSITORY / "tests/slurm/toy.smk")]
    command += ["--profile", str(workspace.profile())]
    command += ["--snaketron-slurm-init-seconds-before-status-checks=1", "--max-status-checks-per-second=10"]
    command += ["--keep-going", *(f"{fate}.txt" for fate in fates)]
    slow = directory / "slow"  # a scontrol that takes longer than the executor plugin waits for it
    slow.mkdir(exist_ok=True)
    (slow / "scontrol").write_text(f'#!/bin/sh\nsleep 12\nexec {plain.path}/bin/scontrol "$@"\n')
    (slow / "scontrol").chmod(0o755)
    environment = plain.environment() | {"PYTHONUNBUFFERED": "1"}
    environment["PATH"] = f"{slow}:{environment['PATH']}"
    log = directory / "submitting.log"
    process: Forked | subprocess.Popen[bytes]
    with log.open("w") as output:
        if before:
            process = subprocess.Popen(
                [*before, sys.executable, *command],
                cwd=directory,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        else:
            process = Forked(command, directory, log, environment)
    try:
        yield Running(process, log)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def job_of(plain: Slurm, log: Path, fate: str) -> Job | None:
    """The last job that was submitted for a fate, as far as Slurm still knows it."""
    numbers = re.findall(rf"meet {fate} is submitted as Slurm job (\d+)", log.read_text(encoding="utf-8"))
    found = [job for job in plain.jobs(Workspace(log.parent)) if numbers and job.id == int(numbers[-1])]
    return found[0] if found else None


@pytest.fixture(scope="module")
def transcript(plain: Slurm, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What Snakemake printed. The controller is away for half a minute, which one job outlasts."""
    fates = ("well", "killed", "never", "refused", "full", "outlasting")
    with meeting(plain, tmp_path_factory.mktemp("fates"), *fates) as running:

        def runs(fate: str) -> Job | None:
            job = job_of(plain, running.log, fate)
            return job if job and job.state == "RUNNING" else None

        waiting = wait_for(lambda: job_of(plain, running.log, "never"), 180)
        plain.scancel(str(waiting.id))
        killed = wait_for(lambda: runs("killed"), 180)
        wait_for(lambda: (running.log.parent / "logs/killed.log").exists(), 180)
        plain.scancel("--signal=KILL", "--full", str(killed.id))
        wait_for(lambda: f"Slurm job {killed.id} " in running.log.read_text(), 180)
        wait_for(lambda: (running.log.parent / "logs/well.log").exists(), 180)
        assert not (running.log.parent / "well.txt").exists()
        plain.stop_controller()
        try:
            time.sleep(30)
            wait_for((running.log.parent / "well.txt").exists, 180)
            wait_for(lambda: "Slurm is asked again" in running.log.read_text(), 300)
        finally:
            plain.start_controller()
        wait_for(lambda: "Slurm answers again" in running.log.read_text(), 300)
        (running.log.parent / "answered").touch()
        result = running.result()
    assert result.status == 1
    made = {path.stem for path in running.log.parent.glob("*.txt")}
    assert made == {"well", "killed", "never", "outlasting"}
    return result.output


def errors(transcript: str, fate: str) -> list[str]:
    """What the lines on failed jobs of a fate say."""
    return re.findall(rf"\] meet {fate} has failed: (.*)", transcript)


def test_a_run_ends_when_its_jobs_are_over_whatever_slurm_answers(transcript: str):
    """With a slow scontrol, and a controller that is away."""
    assert "Slurm answers again, after " in transcript
    assert "sacct" not in transcript


def test_a_waiting_job_that_is_cancelled_says_so_in_a_line(transcript: str):
    (why,) = errors(transcript, "never")
    assert re.fullmatch(
        r"Slurm job \d+ was cancelled \(by whom, only Slurm's accounting would know\) before it began", why
    )
    assert "not found" not in transcript


def test_a_job_that_is_killed_is_submitted_again(transcript: str):
    """The second try may meet the controller's absence, and then there is a third."""
    first, *_ = errors(transcript, "killed")
    assert first.endswith(" was cancelled (by whom, only Slurm's accounting would know)")


def test_a_refused_job_is_a_line_and_submitted_once(transcript: str):
    (why,) = errors(transcript, "refused")
    assert why == (
        "it is refused and not submitted again: "
        "sbatch: invalid partition specified: nowhere; Invalid partition name specified"
    )
    assert "--wrap" not in transcript


def test_a_job_that_met_a_full_disk_is_submitted_once(transcript: str):
    (why,) = errors(transcript, "full")
    assert re.match(
        r"Slurm job \d+ failed and is not submitted again: cannot write the output: no space left; ", why
    )
    assert transcript.count("meet full is submitted as Slurm job ") == 1


def test_a_job_waits_for_one_that_a_killed_snakemake_left_and_a_script_can_stop_it(
    plain: Slurm, tmp_path: Path
):
    """A script starts the second Snakemake with `&`, so it begins with SIGINT ignored."""
    here = tmp_path / "work"
    with meeting(plain, here, "long") as running:
        wait_for(lambda: (here / "logs/long.log").exists(), 180)
        first = job_of(plain, running.log, "long")
        assert first and first.state == "RUNNING"
    try:
        with meeting(plain, here, "long", before=("sh", "-c", "trap '' INT; exec \"$@\"", "sh")) as running:

            def waits() -> Job | None:  # at first Slurm may say that other jobs have the node
                job = job_of(plain, running.log, "long")
                return job if job and (job.state, job.reason) == ("PENDING", "Dependency") else None

            second = wait_for(waits, 180)
            assert (
                f"Slurm jobs of an earlier Snakemake are still here: {first.id}. " in running.log.read_text()
            )
            os.kill(running.process.pid, signal.SIGINT)
            assert running.result().status != 0
        states = {job.id: job.state for job in plain.jobs(Workspace(here))}
        assert states == {first.id: "RUNNING", second.id: "CANCELLED"}
    finally:
        plain.scancel(str(first.id))
