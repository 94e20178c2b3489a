"""Run a job as it is, and kill it at a chosen moment."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Workspace

import psutil


def shell_lines(workspace: Workspace, target: str, *config: str) -> list[str]:
    """The commands that make `target`, as a dry-run prints them."""
    result = workspace.snakemake("-np", target, config=config)
    assert result.status == 0, result.output
    prefix = "Shell command: "
    return [line.removeprefix(prefix) for line in result.output.splitlines() if line.startswith(prefix)]


def run_until(
    workspace: Workspace, command: list[str], reached: Callable[[], bool], number: signal.Signals
) -> tuple[int, str]:
    """Start `command` and send `number` to all its processes as soon as `reached`; status and output.

    It must be reached before the command ends.
    """
    log = workspace.path / "killed.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=workspace.path, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 240
            while not reached():
                assert process.poll() is None, f"ended before the moment came:\n{log.read_text()[-3000:]}"
                assert time.monotonic() < deadline, f"the moment never came:\n{log.read_text()[-3000:]}"
                time.sleep(0.002)
            # All at once: torchrun puts its workers in sessions of their own.
            everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for one in everyone:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.send_signal(number)
            process.wait(timeout=120)
            psutil.wait_procs(everyone, timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, log.read_text()


def exists(root: Path, pattern: str) -> Callable[[], bool]:
    return lambda: next(root.glob(pattern), None) is not None


def saved(root: Path, iteration: int, version: str = "*") -> Callable[[], bool]:
    """Whether some such version below `root` has a complete checkpoint of at least `iteration` steps."""

    def reached() -> bool:
        for file in root.glob(f"versions/{version}/latest_checkpointed_iteration.txt"):
            if int(file.read_text() or 0) >= iteration:
                return True
        return False

    return reached
