"""The supervisor of a training: watches over its processes, and starts them again where that may help.

`python scripts/pretrain.py ...` is the supervisor, in a shell as in a Slurm job. It owns the version
directory and starts the same command once a process (`launch`). It tells the processes to save and stop when
a signal comes or the job's time limit is near, kills them when they hang, and starts them again unless
the attempts so far forbid it (`attempts`). They say how far they are (`heartbeat`) and why they failed.
"""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from snaketron.files import read_json
from snaketron.jobs import heartbeat, slurm
from snaketron.jobs import version as versions
from snaketron.jobs.attempts import Attempts
from snaketron.jobs.launch import FAILURES, SAVED, Ranks
from snaketron.log import UserError, logger
from snaketron.settings.training import RunSettings

POLL_S = 0.2
HANDOVER_S = 600.0  # for Slurm to end a job that was requeued or told to go


@dataclass
class Ended:
    """How an attempt ended."""

    why: Literal["exit", "signal", "time limit", "hang"]
    status: int


class Signals:
    """Notes the signals that ask to stop, in order."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: list[int] = []

    def __enter__(self) -> Signals:
        self._before = {n: signal.signal(n, lambda n, _: self.received.append(n)) for n in self.NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Limit:
    """The time limit of the Slurm job: asked for at the start, and again when it seems near, as an
    administrator may have moved it."""

    def __init__(self, job: slurm.Job | None, margin: float) -> None:
        self.job, self.margin = job, margin
        self.stop_at = self._ask()
        if self.stop_at is not None and self.stop_at <= time.monotonic():
            raise UserError(
                f"the Slurm job ends within stop_before_limit ({margin:.0f} s): raise its time limit "
                "(`runtime` in the profile, minutes), or lower stop_before_limit to what a checkpoint takes"
            )

    def is_near(self) -> bool:
        if self.stop_at is not None and time.monotonic() >= self.stop_at:
            self.stop_at = self._ask()
            return self.stop_at is not None and time.monotonic() >= self.stop_at
        return False

    def _ask(self) -> float | None:
        left = slurm.seconds_left(self.job) if self.job else None
        return None if left is None else time.monotonic() + left - self.margin


def watch(ranks: Ranks, directory: Path, signals: Signals, limit: Limit, step_timeout: float) -> Ended:
    """Wait until the processes have ended, and have them stop, or be killed, when it is time."""
    why: Literal["exit", "signal", "time limit", "hang"] = "exit"
    heard, last = time.monotonic(), None
    seen = len(signals.received)
    while (status := ranks.poll()) is None:
        time.sleep(POLL_S)
        if len(signals.received) > seen:
            seen = len(signals.received)
            if why == "signal":
                ranks.kill()  # asked twice
            elif why == "exit":
                why = "signal"
                ranks.stop()
        if why == "exit" and limit.is_near():
            why = "time limit"
            ranks.stop()
        if (beat := _changed(directory / heartbeat.FILE)) != last:
            heard, last = time.monotonic(), beat
        if time.monotonic() - heard > step_timeout:
            why, heard = "hang", time.monotonic()
            ranks.kill()
    return Ended(why, status)


def _changed(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


# --------------------------------------------------------------------------------------- supervising


def supervise(
    name: str, directory: Path, run: RunSettings, is_finished: Callable[[], bool], *, attempt: int = 1
) -> int:
    """Run a training to its end, in this job; the exit status.

    Args:
        name: stage, for messages.
        directory: the version that it works in.
        run: how it is run.
        is_finished: whether the version is complete.
        attempt: how often Snakemake has submitted this job. From the second time on, what gave up stays so.

    Raises:
        UserError: the training gave up, or another one owns the version.
    """
    with Signals() as signals:
        supervisor = Supervisor(name, directory, run, is_finished, signals, slurm.current_job())
        status = supervisor.run_to_the_end(attempt)
        if supervisor.to_be_ended:
            _wait_to_be_ended(signals)
        return status


@dataclass
class Supervisor:
    """One training in one job."""

    name: str
    directory: Path
    run: RunSettings
    is_finished: Callable[[], bool]
    signals: Signals
    job: slurm.Job | None  # the Slurm job that this is
    to_be_ended: bool = False  # by Slurm, which requeues, pre-empts or cancels the job

    def run_to_the_end(self, attempt: int) -> int:
        with versions.own(self.directory) as owner:
            if self.is_finished():
                logger.info("%s: these settings were trained before: %s", self.name, self.directory)
                return 0
            attempts = Attempts(self.name, self.directory, self.run.max_restarts)
            if attempt > 1 and attempts.gave_up:
                raise UserError(f"{self.name}: {attempts.gave_up}")
            while True:
                before = versions.latest_iteration(self.directory) or 0
                limit = Limit(self.job, self.run.stop_before_limit)
                shutil.rmtree(self.directory / FAILURES, ignore_errors=True)
                (self.directory / heartbeat.FILE).unlink(missing_ok=True)
                attempts.check(before)
                ranks = Ranks([sys.executable, *sys.argv], self.run, owner, self.job)
                attempts.begin(before, self.job.id if self.job else None)
                ranks.start()
                logger.info("%s: %s, after step %d", self.name, ranks, before)
                ended = watch(ranks, self.directory, self.signals, limit, self.run.step_timeout)
                status = self.judge(ended, attempts)
                if status is not None:
                    return status

    def judge(self, ended: Ended, attempts: Attempts) -> int | None:
        """Note how an attempt ended; the exit status of the job, or None to start once more."""
        saved = versions.latest_iteration(self.directory) or 0
        done = max(heartbeat.read(self.directory).get("iteration", 0), saved)
        if ended.status == 0 and self.is_finished():
            attempts.end("finished", done)
            return 0
        if ended.why == "signal" or (ended.why == "exit" and ended.status == SAVED):
            attempts.end("stopped", done)
            # Slurm may have told the processes alone.
            return self.stopped(self.signals.received[0] if self.signals.received else signal.SIGTERM, saved)
        failure = _first_failure(self.directory)
        if ended.why == "hang":
            error = f"no step within step_timeout ({self.run.step_timeout} s)"
        else:
            error = failure["error"] if failure else f"a process {_ended_with(ended.status)}"
            if failure and any(words in error for words in _PEER_IS_GONE):  # which could say nothing itself
                error = f"a process {_ended_with(ended.status)}, of which another one noticed: {error}"
        if ended.why == "time limit":
            attempts.end("time limit", done, None if ended.status == SAVED else error)
            return self.hand_over(saved)
        attempts.end("hung" if ended.why == "hang" else "failed", done, error)
        if failure and failure["traceback"]:
            where = f"{self.name}: rank {failure['rank']} on {failure['host']}"
            logger.error("%s failed after step %d\n%s", where, done, failure["traceback"].rstrip())
        if failure and failure["by_user"]:
            attempts.give_up(error)
            raise UserError(error)
        logger.warning("%s: %s after step %d; starting again from step %d", self.name, error, done, saved)
        return None

    def stopped(self, number: int, saved: int) -> int:
        logger.warning(
            "%s: stopped by %s after step %d; run the same command again to continue",
            self.name,
            signal.Signals(number).name,
            saved,
        )
        # A pre-empted job that ends by itself counts as failed, and is not requeued.
        self.to_be_ended = number == signal.SIGTERM and self.job is not None and self.job.of_rule
        return 128 + number

    def hand_over(self, saved: int) -> int:
        what = f"{self.name}: saved step {saved} before the time limit"
        if self.job and self.job.of_rule and slurm.requeue(self.job):
            logger.warning("%s; job %s goes on from there", what, self.job.id)
            self.to_be_ended = True
        else:
            logger.warning("%s; run the same command again to continue", what)
        return SAVED


def _wait_to_be_ended(signals: Signals) -> None:
    """Wait for Slurm to end the job; the version is let go of by now."""
    before, deadline = len(signals.received), time.monotonic() + HANDOVER_S
    while len(signals.received) == before and time.monotonic() < deadline:
        time.sleep(POLL_S)


# In what gloo and NCCL say when the process at the other end has died.
_PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "remote process exited")


def _first_failure(directory: Path) -> dict[str, Any] | None:
    """What the process that failed first said; the others fail because it is gone."""
    said = [read_json(path) for path in (directory / FAILURES).glob("rank_*.json")]
    return min(said, key=lambda failure: failure["time"], default=None)


def _ended_with(status: int) -> str:
    number = -status if status < 0 else status - 128  # of a child, or as srun and the shell say it
    if 0 < number < signal.NSIG:
        hint = " (out of memory?)" if number == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(number).name}{hint}"
    return f"ended with status {status}"
