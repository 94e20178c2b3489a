"""What Slurm answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from snaketron.jobs import slurm

import pytest


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("2-00:00:01", 172801.0),
        ("4:00:00", 14400.0),
        ("1:05", 65.0),
        ("UNLIMITED", None),
        ("NOT_SET", None),
        ("INVALID", None),
        ("", None),
    ],
)
def test_times_of_squeue(text: str, seconds: float | None):
    assert slurm.parse_time(text) == seconds


@pytest.mark.parametrize(
    ("restarts", "time", "requeued", "pre_empted"),
    [("2", "N/A", True, False), ("1", "N/A", False, False), ("1", "2026-11-28T18:34:20", False, True)],
)
def test_slurm_says_that_it_runs_a_job_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    restarts: str,
    time: str,
    requeued: bool,
    pre_empted: bool,
):
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\ncase $* in *RestartCnt*) echo {restarts};; *) echo {time};; esac\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    job = slurm.Job("7", of_rule=True, restarts=1)
    assert (slurm.is_requeued(job), slurm.is_preempted(job)) == (requeued, pre_empted)


PRESSED = """
import os, signal, sys
from snaketron.jobs import slurm
signal.signal(signal.SIGINT, lambda *_: None)
print(slurm.ask("sh", "-c", f"kill -INT -{os.getpid()}; sleep 1; echo the jobs are cancelled"))
"""


def test_ctrl_c_does_not_end_a_command_of_slurm():
    """Pressed a second time it killed scancel, and the jobs lived on."""
    done = subprocess.run(
        [sys.executable, "-c", PRESSED], capture_output=True, text=True, start_new_session=True
    )
    assert (done.stdout, done.stderr) == ("the jobs are cancelled\n\n", "")
