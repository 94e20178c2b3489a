"""The supervisor of a training: watches over its processes, and starts them again where that may help.

`python scripts/pretrain.py ...` is the supervisor, in a shell as in a Slurm job. It owns the version
directory (`owner`) and starts the same command once a process (`launch`). It tells the processes to save and
stop when a signal comes or the job's time limit is near, kills them when they hang, and starts them again
unless the attempts so far forbid it (`attempts`). They say how far they are (`heartbeat`) and why they
failed (`launch`).
"""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from snaketron.jobs import heartbeat, places, slurm
from snaketron.jobs.attempts import Attempts
from snaketron.jobs.launch import SAVED, STOP_SIGNALS, STOPPED, Ranks, first_failure
from snaketron.jobs.owner import Owner, own
from snaketron.jobs.version import Version
from snaketron.log import UserError, logger
from snaketron.settings.training import RunSettings
from snaketron.wording import after, ended_with

POLL_S = 0.2
TO_BE_CONTINUED = 75  # exit status of a training that saved before the time limit (EX_TEMPFAIL)
REQUEUED, PRE_EMPTED = "requeues (a node was lost or taken down, say)", "pre-empts and requeues"
HANDOVER_S = 600.0  # for Slurm to end a job that was requeued or told to go


type End = Literal["exit", "signal", "time limit", "hang"]


@dataclass
class Ended:
    """How an attempt ended."""

    why: End
    status: int


class Signals:
    """Notes the signals that ask to stop, in order."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def __enter__(self) -> Signals:
        self._before = {n: signal.signal(n, lambda n, _: self.received.append(n)) for n in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Limit:
    """The time limit of the Slurm job.

    Slurm is asked at the start, and again when the limit seems near: an administrator may have moved it.
    """

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


def watch(
    ranks: Ranks,
    beats: Path,
    signals: Signals,
    limit: Limit,
    step_timeout: float,
    on_signal: Callable[[], None] = lambda: None,
) -> Ended:
    """Wait until the processes have ended, and stop or kill them when it is time.

    They are stopped at a first signal and near the time limit. They are killed at a second signal, and when
    the file `beats` has not changed for `step_timeout` seconds, once they had time to say where they are.
    `on_signal` is called after a first signal.
    """
    why: End = "exit"
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
                logger.info("finishing the step and saving; a second signal kills the processes, unsaved")
                ranks.stop()
                on_signal()
        if why == "exit" and limit.is_near():
            why = "time limit"
            ranks.stop()
        if (beat := _changed(beats)) != last:
            heard, last = time.monotonic(), beat
        if time.monotonic() - heard > step_timeout:
            ranks.ask_where()
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
    name: str,
    version: Version,
    run: RunSettings,
    *,
    attempt: int = 1,
    prepare: Callable[[], None] = lambda: None,
    beside: Callable[[], AbstractContextManager[None]] = nullcontext,
    saved: Callable[[], int] | None = None,
) -> int:
    """Run a training to its end, in this job; the exit status.

    Args:
        name: stage, for messages.
        version: where it works.
        run: how it is run.
        attempt: how often Snakemake has submitted this job. From the second time on, a training that gave up
            is not tried again.
        prepare: what to do in the version before its processes start; nobody else works in it by then.
        beside: entered while there is something to train.
        saved: what is done for good, which counts as progress; None: the steps of the newest checkpoint.

    Raises:
        UserError: the training gave up, or another one owns the version.
    """
    with Signals() as signals:
        saved = saved or (lambda: version.latest_iteration() or 0)
        supervisor = Supervisor(name, version, run, signals, slurm.current_job(), saved)
        status = supervisor.run_to_the_end(attempt, prepare, beside)
        if supervisor.to_be_ended:
            _wait_to_be_ended(signals)
        return status


@dataclass
class Supervisor:
    """One training in one job."""

    name: str
    version: Version
    run: RunSettings
    signals: Signals
    job: slurm.Job | None  # the Slurm job that this is
    saved: Callable[[], int]
    to_be_ended: bool = False  # by Slurm, which requeues, pre-empts or cancels the job
    goes_on: str = ""  # what Slurm does to the job before it runs it again; empty where it does not

    def run_to_the_end(
        self, attempt: int, prepare: Callable[[], None], beside: Callable[[], AbstractContextManager[None]]
    ) -> int:
        version = self.version
        with own(version) as owner:
            if version.is_finished:
                logger.info("%s: these settings were trained before: %s", self.name, version.directory)
                return 0
            attempts = Attempts(self.name, version.attempts, self.run.max_restarts)
            if attempt > 1 and attempts.gave_up:
                raise UserError(f"{self.name}: {attempts.gave_up}")
            prepare()
            with beside():
                return self.run_attempts(attempts, owner)

    def run_attempts(self, attempts: Attempts, owner: Owner) -> int:
        version = self.version
        while True:
            before = self.saved()
            limit = Limit(self.job, self.run.stop_before_limit)
            shutil.rmtree(version.failures, ignore_errors=True)
            version.heartbeat.unlink(missing_ok=True)
            attempts.check(before)
            ranks = Ranks([sys.executable, *sys.argv], self.run, owner, self.job)
            attempts.begin(before, self.job.id if self.job else None)
            ranks.start()
            again = f" again, {after(before)}" if before else ""
            logger.info("%s: starts%s (%s)", self.name, again, ranks)
            ended = watch(
                ranks, version.heartbeat, self.signals, limit, self.run.step_timeout, self.look_ahead
            )
            status = self.judge(ended, attempts)
            if status is not None:
                return status

    def judge(self, ended: Ended, attempts: Attempts) -> int | None:
        """Note how an attempt ended; the exit status of the job, or None to start once more."""
        saved = self.saved()
        beat = heartbeat.read(self.version.heartbeat)
        done = max(beat.iteration if beat else 0, saved)
        if ended.status == 0 and self.version.is_finished:
            attempts.end("finished", done)
            return 0
        if ended.why == "signal" or (ended.why == "exit" and self.was_told_alone(ended)):
            if not self.goes_on:
                self.look_ahead()
            attempts.end("requeued" if self.goes_on == REQUEUED else "stopped", done)
            return self.stopped(self.signals.received[0] if self.signals.received else signal.SIGTERM, saved)
        failure = first_failure(self.version.failures)
        error = self.explain(ended, failure["error"] if failure else None)
        if ended.why == "time limit":
            attempts.end("time limit", done, None if ended.status in STOPPED else error)
            return self.hand_over(saved)
        attempts.end("hung" if ended.why == "hang" else "failed", done, error)
        if failure and failure["traceback"]:
            where = f"{self.name}: rank {failure['rank']} on {failure['host']}"
            logger.error("%s failed %s\n%s", where, after(done), failure["traceback"].rstrip())
        if ended.why == "hang" and (late := places.behind(places.read(self.version.failures))):
            where = f"{self.name}: rank {late.rank} on {late.host}"
            logger.error("%s was here %s\n%s", where, after(late.steps), late.stack)
        if failure and failure["by_user"]:
            attempts.give_up(error)
            raise UserError(error)
        again = f"step {saved}" if saved else "the beginning"
        logger.warning("%s: %s %s; starting again from %s", self.name, error, after(done), again)
        return None

    def was_told_alone(self, ended: Ended) -> bool:
        """Whether Slurm told the processes to stop and not the supervisor, as it does to pre-empt a job.

        Then they have saved, or died because they had not begun to train, or srun could not start them:
        Slurm refuses that from then on.
        """
        return ended.status == SAVED or (self.job is not None and slurm.is_preempted(self.job))

    def explain(self, ended: Ended, said: str | None) -> str:
        """Why an attempt failed; `said` is what the first process to fail said, if it could."""
        if ended.why == "hang":
            before = heartbeat.read(self.version.heartbeat) is None
            advice = "; scripts/doctor.py tries whether the processes reach each other" if before else ""
            where = places.sentence(places.read(self.version.failures), self.run.parallel.world_size)
            return f"no step within step_timeout ({self.run.step_timeout} s; {where}{advice})"
        if said is None:
            return f"a process {ended_with(ended.status)}"
        if any(words in said for words in _PEER_IS_GONE):  # the process that died could say nothing itself
            return f"a process {ended_with(ended.status)}, of which another one noticed: {said}"
        return said

    def look_ahead(self) -> None:
        """Find out whether Slurm runs the job again, and say so while there is time to say something."""
        if not self.job or not self.job.of_rule:
            return
        if slurm.is_preempted(self.job):
            self.goes_on = PRE_EMPTED
        elif slurm.is_requeued(self.job):
            self.goes_on = REQUEUED
        else:
            return
        logger.warning(
            "%s: Slurm %s job %s, which then goes on by itself", self.name, self.goes_on, self.job.id
        )

    def stopped(self, number: int, saved: int) -> int:
        if self.goes_on and self.job:
            logger.warning(
                "%s: stopped; job %s goes on from step %d by itself", self.name, self.job.id, saved
            )
        else:
            logger.warning(
                "%s: stopped by %s %s; run the same command again to continue",
                self.name,
                signal.Signals(number).name,
                after(saved),
            )
        # Slurm requeues a pre-empted job, but counts one that ends by itself as failed.
        self.to_be_ended = number == signal.SIGTERM and self.job is not None and self.job.of_rule
        return 128 + number

    def hand_over(self, saved: int) -> int:
        what = f"{self.name}: saved step {saved} before the time limit"
        if self.job and self.job.of_rule and slurm.requeue(self.job):
            logger.warning("%s; job %s goes on from there", what, self.job.id)
            self.to_be_ended = True
        else:
            logger.warning("%s; run the same command again to continue", what)
        return TO_BE_CONTINUED


def _wait_to_be_ended(signals: Signals) -> None:
    """Wait for Slurm to end the job, whose version is free by now."""
    before, deadline = len(signals.received), time.monotonic() + HANDOVER_S
    while len(signals.received) == before and time.monotonic() < deadline:
        time.sleep(POLL_S)


# gloo and NCCL say this when the process at the other end has died.
_PEER_IS_GONE = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
