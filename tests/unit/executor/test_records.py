"""What jobs leave behind, written by their shell and read by Snakemake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from snaketron.executor.records import COMMAND, Record, Records

import pytest


def run(records: Records, command: str, job: str = "7", restarts: int = 0, *, bounded: bool = False) -> int:
    """Run a command as the shell of a Slurm job does."""
    records.directory.mkdir(exist_ok=True)
    environment = os.environ | {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": str(restarts)}
    if not restarts:
        del environment["SLURM_RESTART_COUNT"]  # Slurm sets it when it requeues a job
    script = f"{records.before(bounded=bounded)} && {command} && {records.after}"
    return subprocess.run(["/bin/sh", "-c", script], env=environment, stderr=subprocess.DEVNULL).returncode


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path / "it's a run")


@pytest.mark.parametrize(("command", "status"), [("true", 0), ("false", 1), ("(exit 75)", 75)])
def test_a_job_notes_its_exit_status_and_ends_with_it(records: Records, command: str, status: int):
    assert run(records, command) == status
    assert records.read() == {"7": Record(status=status)}


def test_a_command_sees_which_job_it_is_in_and_no_other_variable_of_slurm(
    records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """An srun in it would take the others for options."""
    for name in ("SLURM_NTASKS", "SLURM_NODELIST", "SRUN_CPUS_PER_TASK", "SBATCH_PARTITION"):
        monkeypatch.setenv(name, "2\nSLURM_TRES_PER_TASK=3")
    seen = tmp_path / "seen"
    assert run(records, f"{COMMAND} sh -c 'env > {seen}; exit 3'") == 3
    names = {line.split("=")[0] for line in seen.read_text().splitlines()}
    assert {name for name in names if name.startswith(("SLURM_", "SRUN_", "SBATCH_"))} == {"SLURM_JOB_ID"}
    assert records.read() == {"7": Record(status=3)}


def test_a_job_that_is_killed_leaves_no_exit_status(records: Records):
    run(records, "kill -KILL $$")
    assert records.read() == {"7": Record()}


def test_only_the_last_run_of_a_requeued_job_counts(records: Records):
    run(records, "false")
    run(records, "kill -KILL $$", restarts=1)
    assert records.read() == {"7": Record(restarts=1)}
    run(records, "true", restarts=10)
    assert records.read() == {"7": Record(restarts=10, status=0)}
    records.forget("7")
    assert records.read() == {}


@pytest.mark.parametrize(("restarts", "bounded"), [(3, True), (4, False), (4, True)])
def test_a_job_that_is_requeued_again_and_again_gives_up_unless_it_is_a_training(
    records: Records, restarts: int, bounded: bool
):
    gives_up = bounded and restarts > 3
    assert run(records, "true", restarts=restarts, bounded=bounded) == gives_up
    assert records.read() == {"7": Record(restarts, int(gives_up))}


@pytest.mark.parametrize(
    ("error", "options", "final"),
    [
        ("UserError('no such file')", "", "no such file"),
        ("UserError('the network is away')", ", may_pass=True", None),
        (
            "OSError(28, '-', 'a.bin')",
            "",
            "cannot write a.bin: no space left; free some and run the same command again",
        ),
        ("ValueError('our mistake')", "", None),
    ],
)
def test_an_error_that_another_try_would_meet_again_is_noted(records: Records, error, options, final):
    program = f"from snaketron.log import UserError, run\ndef main(): raise {error}\nrun(main{options})"
    assert run(records, f'{sys.executable} -c "{program}"') == 1
    assert records.read() == {"7": Record(status=1, final=final)}
