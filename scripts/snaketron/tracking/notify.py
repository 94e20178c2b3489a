"""Facts about a run for a command of the user: at the end, on a failure, on a stall."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Literal

from snaketron.jobs import heartbeat
from snaketron.jobs.attempts import read_attempts
from snaketron.jobs.version import Version, versions
from snaketron.log import logger

import orjson

TIMEOUT_S = 30  # for the command

What = Literal["finished", "failed", "stopped", "stalled"]
BEGAN = time.time()  # this process, as far as it matters


def tell(command: list[str], what: What, version: Version | None, **facts: Any) -> None:
    """Run the command with the facts as a JSON object on its standard input, in no shell.

    A command that fails, hangs or is not there is one warning.

    Args:
        command: its words; nothing happens where there are none.
        what: what has happened.
        version: the training that it is about.
        facts: what else is known; what is None is left out.
    """
    if not command:
        return
    known = {"what": what, **(of_training(version) if version else {}), "directory": str(Path.cwd()), **facts}
    given = orjson.dumps({key: value for key, value in known.items() if value is not None}, default=str)
    try:
        # A session of its own, so that what the command starts can be ended with it.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )
    except OSError as error:
        logger.warning("notify.command: %s", error)
        return
    try:
        process.communicate(given + b"\n", timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        logger.warning("notify.command: %s had not ended after %d s and was killed", command[0], TIMEOUT_S)
        return
    if process.returncode:
        logger.warning("notify.command: %s ended with status %d", command[0], process.returncode)


def of_training(version: Version) -> dict[str, Any]:
    """How far a training is."""
    beat = heartbeat.read(version.heartbeat)
    return {
        "stage": re.sub("^pretrain_", "pretrain/", version.directory.resolve().name.rpartition("-")[0]),
        "step": beat and beat.iteration,
        "steps": beat and beat.train_iters,
        "loss": beat and beat.loss,
        "version": str(version.directory),
        "training_log": str(version.log),
    }


def last_training(ckpt: Path, since: float) -> Version | None:
    """The training that was last heard of, after a time (seconds since 1970); None where none was."""
    heard = {}
    for version in versions(ckpt):
        try:
            heard[version.heartbeat.stat().st_mtime] = version
        except FileNotFoundError:
            continue
    last = max(heard, default=0.0)
    return heard[last] if last >= since else None


def tell_of_workflow(
    command: list[str], what: What, ckpt: Path, logs: list[str], jobs: list[str] | None = None
) -> None:
    """Tell how this process' workflow ended, which jobs failed, and the training that was heard of last."""
    version = last_training(ckpt, BEGAN) if command else None
    last = next(reversed(read_attempts(version.attempts)), None) if version else None
    if what == "failed" and last and last.outcome == "stopped":
        what = "stopped"
    error = last.error if last and what == "failed" else None
    log = next(iter(logs), None)
    failed = jobs if what == "failed" and jobs else None
    tell(command, what, version, jobs=failed, log=log, seconds=round(time.time() - BEGAN, 1), error=error)
