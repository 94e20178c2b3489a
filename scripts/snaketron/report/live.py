"""How far a run is, from its files alone: what the live view of a terminal and `status.py --watch` show."""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snaketron.graph import process
from snaketron.graph.journal import Job, Journal
from snaketron.jobs import heartbeat, slurm
from snaketron.jobs.attempts import read_attempts, state_of
from snaketron.jobs.lines import Tail, line_of_metrics
from snaketron.jobs.queue import Queued, queued_in
from snaketron.jobs.version import Version, published, versions
from snaketron.report.workflow import RULES, files_of, read_benchmark, rule_of
from snaketron.sizes.outlook import Planned
from snaketron.tracking.warnings import Warning, warnings_of

RECENT = 8  # lines of metrics that say how fast a training is
MOST_POINTS = 4096  # of a curve; above it, every second one goes
SLACK_S = 30.0  # between the clock of Snakemake and that of the file system
ASK_EVERY_S = 30.0  # Slurm
LOOK_AT_LOCK_S = 5.0
BENCHMARKS = 32  # of a rule, from which the time of a job is taken that has not run yet
FEW = 3  # more jobs that wait are counted by their rule and reason


@dataclass(frozen=True)
class Rule:
    """The jobs of a rule that is not a training."""

    name: str
    state: str  # waiting, running, finished, failed, stopped
    done: int
    total: int


@dataclass(frozen=True)
class Training:
    """A training of the run."""

    name: str
    state: str  # waiting, running, finished, failed, stopped
    done: int = 0  # steps
    total: int = 0
    about: str = ""  # what it does where that is not steps
    loss: float | None = None
    curve: Sequence[float] = ()  # losses, first to last
    tokens_per_second: float | None = None
    seconds_left: float | None = None  # None where nothing says so
    warning: Warning | None = None  # the last one
    warned: float = 0.0  # when its metrics were written last


@dataclass(frozen=True)
class Running:
    """A job that was begun."""

    title: str
    seconds: float
    where: str = ""  # of Slurm: its number there, and its state


@dataclass(frozen=True)
class View:
    """What there is to show."""

    state: str  # running, finished, failed, stopped, or "" where nothing has run
    seconds: float = 0.0  # since it began
    done: int = 0  # jobs
    total: int = 0
    rules: Sequence[Rule] = ()
    trainings: Sequence[Training] = ()
    running: Sequence[Running] = ()
    waiting: Sequence[tuple[str, int]] = ()  # what waits in Slurm's queue and why, and how many such jobs
    failed: Sequence[str] = ()  # jobs
    seconds_left: float | None = None
    at_least: bool = False  # whether more is left than `seconds_left` counts
    warning: tuple[str, Warning] | None = None  # the last one, with its training


# ---------------------------------------------------------------------------------------------- metrics


@dataclass
class Measured:
    """What the metrics of a version say so far."""

    tail: Tail
    curve: list[float] = field(default_factory=list)
    every: int = 1  # how many lines of metrics a point of the curve stands for
    recent: list[tuple[int, float]] = field(default_factory=list)  # steps and seconds
    step: int = 0
    lines: int = 0
    warning: Warning | None = None

    def look(self) -> None:
        if self.tail.changed():
            self.curve, self.every, self.recent = [], 1, []
            self.step, self.lines, self.warning = 0, 0, None
        for raw in self.tail.lines():
            line = line_of_metrics(raw)
            if line is None:
                continue
            if found := warnings_of([line]):
                self.warning = found[-1]
            if (loss := line.get("loss")) is not None:
                self._add(line, loss)

    def _add(self, line: dict[str, Any], loss: float) -> None:
        self.step = line["iteration"]
        self.lines += 1
        if self.lines % self.every == 0:
            self.curve.append(loss)
        if len(self.curve) > MOST_POINTS:
            self.curve, self.every = self.curve[1::2], 2 * self.every
        if (seconds := line.get("timing", {}).get("seconds")) is not None:
            self.recent = [*self.recent[-RECENT:], (self.step, seconds)]

    @property
    def seconds_per_step(self) -> float | None:
        """Measured between the last lines, with waits for data and checkpoints."""
        if len(self.recent) < 2:
            return None
        (first, begin), (last, end) = self.recent[0], self.recent[-1]
        return (end - begin) / (last - first) if last > first and end > begin else None


# ------------------------------------------------------------------------------------------------ Slurm


class Queue:
    """What Slurm says of the jobs of a directory. It is asked in a thread, as it may take a minute."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.jobs: list[Queued] | None = None  # None until it has answered
        self._asked = -ASK_EVERY_S

    def look(self) -> None:
        now = time.monotonic()
        if now - self._asked >= ASK_EVERY_S:
            self._asked = now
            threading.Thread(target=self._ask, name="squeue", daemon=True).start()

    def _ask(self) -> None:
        try:
            self.jobs = queued_in(self.directory)
        except slurm.NoAnswer:  # the controller is busy, or this is another machine
            self.jobs = None


# ------------------------------------------------------------------------------------------- the follower


class Follower:
    """Looks at a directory again and again, and reads only what is new there.

    Args:
        directory: the working directory of the workflow.
        alive: whether Snakemake is running, where the caller knows; else its lock is tried.
    """

    def __init__(self, directory: Path, *, alive: bool | None = None) -> None:
        self.directory, self.alive = directory, alive
        self.journal = Journal(directory)
        self.queue = Queue(directory)
        self.slurm: dict[str, Queued] = {}  # what Slurm said when it was looked at last, by number
        self.metrics: dict[Path, Measured] = {}
        self.usual: dict[str, float | None] = {}  # seconds of a job of earlier runs, by rule
        self._lock: tuple[float, bool] = (-LOOK_AT_LOCK_S, False)

    def look(self) -> View:
        """What there is to show now."""
        journal, before = self.journal, self.journal.began
        journal.look()
        if not journal.totals:
            return View("")
        if journal.began != before:  # another run, which has locked the directory
            self._lock = -LOOK_AT_LOCK_S, False
        running = self._is_running()
        begun = [job for job in journal.jobs.values() if job.state == "running"]
        if any(job.slurm for job in begun):
            self.queue.look()
        self.slurm = {job.number: job for job in self.queue.jobs or ()}
        trainings = [self._training(*one, running) for one in journal.trainings.items()]
        rules = self._rules(running)
        states = {one.state for one in trainings} | {rule.state for rule in rules}
        waiting = [job for job in begun if self._waits(job)]
        left, at_least = self._left(trainings, rules, [job for job in begun if job not in waiting])
        warned = max(
            ((one.warned, one.name, one.warning) for one in trainings if one.warning),
            key=lambda found: found[0],
            default=None,
        )
        done = sum(job.state == "finished" for job in journal.jobs.values())
        total = sum(journal.totals.values())
        ended = "finished" if done >= total else "failed" if "failed" in states else "stopped"
        state = "running" if running else ended
        until = self._last_sign(begun) if state == "stopped" else time.time() if running else journal.now
        return View(
            state=state,
            seconds=max(0.0, until - journal.began),
            done=done,
            total=total,
            rules=rules,
            trainings=trainings,
            running=[self._running(job) for job in begun if running and job not in waiting],
            waiting=_queue([self.slurm[job.slurm] for job in waiting]) if running else (),
            failed=[job.title for job in journal.jobs.values() if job.state == "failed"],
            seconds_left=left if running else None,
            at_least=at_least,
            warning=warned and warned[1:],
        )

    def _last_sign(self, begun: Sequence[Job]) -> float:
        """When the run was alive last: a Snakemake that was killed has told nothing of its end."""
        signs = [self.directory / job.log for job in begun if job.log]
        for name in self.journal.trainings:
            job = self._job(name)
            if job and job in begun and (version := self._version(name, job)):
                signs.append(version.heartbeat)
        return max([self.journal.now, *(path.stat().st_mtime for path in signs if path.exists())])

    def _is_running(self) -> bool:
        if self.alive is not None:
            return self.alive
        now = time.monotonic()
        if now - self._lock[0] >= LOOK_AT_LOCK_S:
            self._lock = now, process.is_running(self.directory)
        return self._lock[1]

    # ---------------------------------------------------------------------------------------- rules

    def _waits(self, job: Job) -> bool:
        return job.slurm in self.slurm and self.slurm[job.slurm].waits

    def _rules(self, running: bool) -> list[Rule]:
        """The rules that are not trainings, in the order of the workflow: Snakemake counts them in none.

        One waits whose jobs are all in Slurm's queue.
        """
        trained = {rule_of(name) for name in self.journal.trainings}
        states: dict[str, Counter[str]] = {name: Counter() for name in self.journal.totals}
        for job in self.journal.jobs.values():
            waits = job.state == "running" and self._waits(job)
            states.setdefault(job.rule, Counter())["waiting" if waits else job.state] += 1
        found = []
        places = {name: place for place, name in enumerate(RULES)}
        totals = self.journal.totals
        for name in sorted(totals, key=lambda name: places.get(name, len(places))):
            if name in trained or name == "all":
                continue
            of, total = states[name], totals[name]
            state = "finished" if of["finished"] >= total else "failed" if of["failed"] else "waiting"
            if state == "waiting" and of:
                queued = of["waiting"] and not of["running"]
                state = "stopped" if not running else "waiting" if queued else "running"
            found.append(Rule(name, state, of["finished"], total))
        return found

    # ------------------------------------------------------------------------------------ trainings

    def _training(self, name: str, planned: Planned, running: bool) -> Training:
        job = self._job(name)
        if job is None:
            return Training(name, "waiting", planned.done, planned.steps, "", seconds_left=planned.seconds)
        version, state = self._version(name, job), job.state
        if state == "running" and not running:  # with its Snakemake, or it went on without it
            state = state_of(version, read_attempts(version.attempts))[0] if version else "stopped"
        if state == "running" and self._waits(job):  # for the first time, or it was requeued
            state = "waiting"
        if version:
            return self._of_version(name, state, version, planned)
        about = "is being started" if state == "running" else ""
        left = 0.0 if state == "finished" else planned.seconds
        return Training(name, state, planned.done, planned.steps, about, seconds_left=left)

    def _job(self, name: str) -> Job | None:
        """The newest job of a training."""
        wanted = rule_of(name), name.partition("/")[2]
        jobs = [job for job in self.journal.jobs.values() if (job.rule, job.wildcards) == wanted]
        return jobs[-1] if jobs else None

    def _version(self, name: str, job: Job) -> Version | None:
        """The version that a job of the run works in, or has published; None until it has begun there."""
        output = self.directory / job.output
        if job.state == "finished":
            version = published(output)
            return version if version.metrics.exists() else None
        found = []
        for version in versions(output.parents[name.count("/")]):
            if version.is_of(name) and version.attempts.exists():
                found.append((version.attempts.stat().st_mtime, version.directory))
        began, directory = max(found, default=(0.0, Path()))
        return Version(directory) if began > job.began - SLACK_S else None

    def _of_version(self, name: str, state: str, version: Version, planned: Planned) -> Training:
        measured = self.metrics.setdefault(version.directory, Measured(Tail(version.metrics)))
        measured.look()
        beat = heartbeat.read(version.heartbeat)
        done = max(measured.step, beat.iteration if beat else 0)
        total = (beat and beat.train_iters) or planned.steps
        pace, speed = measured.seconds_per_step, beat.tokens_per_second if beat else None
        if pace is None and planned.seconds is not None and planned.steps > planned.done:
            pace = planned.seconds / (planned.steps - planned.done)
        elif pace is None and speed and planned.tokens and planned.steps > planned.done:
            pace = planned.tokens / (planned.steps - planned.done) / speed
        left = None if pace is None else pace * max(0, total - done)
        curve = measured.curve
        return Training(
            name=name,
            state=state,
            done=done,
            total=total,
            about="is being started" if state == "running" and not beat else "",
            loss=beat.loss if beat and beat.loss is not None else curve[-1] if curve else None,
            curve=curve,
            tokens_per_second=speed,
            seconds_left=0.0 if state == "finished" else left,
            warning=measured.warning,
            warned=version.metrics.stat().st_mtime if version.metrics.exists() else 0.0,
        )

    def _running(self, job: Job) -> Running:
        where = [f"job {job.slurm}"] if job.slurm else []
        if known := self.slurm.get(job.slurm):
            where += [known.state, known.about]
        if job.rule == "evaluate" and (version := self._version(job.wildcards, job)):
            beat = heartbeat.read(version.heartbeat)
            where += [f"{beat.iteration} of {beat.train_iters} parts are done"] if beat else []
        return Running(job.title, max(0.0, time.time() - job.began), " ".join(where))

    # ------------------------------------------------------------------------------------ time left

    def _left(
        self, trainings: Sequence[Training], rules: Sequence[Rule], begun: Sequence[Job]
    ) -> tuple[float | None, bool]:
        """Seconds until the run is over, and whether there is more to do of which nothing says how long.

        What was measured counts before what was planned. Jobs with data take what such jobs took in this run
        or an earlier one, as many at a time as now. Trainings follow each other.
        """
        speeds = [one.tokens_per_second for one in trainings if one.tokens_per_second]
        left, unknown = 0.0, 0
        for one in trainings:
            seconds, planned = one.seconds_left, self.journal.trainings[one.name]
            if seconds is None and speeds and planned.tokens:
                seconds = planned.tokens / speeds[-1]
            if seconds is None and not planned.steps:
                seconds = 0.0  # it is only published
            left, unknown = left + (seconds or 0.0), unknown + (seconds is None)
        data = 0.0
        for rule in rules:
            seconds = self._usual(rule.name) if rule.done < rule.total else 0.0
            unknown += seconds is None
            data += (rule.total - rule.done) * (seconds or 0.0)
        now = [job for job in begun if job.rule in {rule.name for rule in rules}]
        data -= sum(min(self._usual(job.rule) or 0.0, time.time() - job.began) for job in now)
        left += max(0.0, data) / max(1, len(now))
        return (left, unknown > 0) if left or not unknown else (None, True)

    def _usual(self, rule: str) -> float | None:
        """Seconds of a job of a rule, by this run or by benchmarks of earlier ones."""
        if taken := self.journal.seconds.get(rule):
            return statistics.mean(taken)
        if rule not in self.usual:
            paths = files_of(rule, self.directory / "benchmarks", ".tsv")[:BENCHMARKS]
            measured = [found[0] for path in paths if (found := read_benchmark(path))]
            self.usual[rule] = statistics.mean(measured) if measured else None
        return self.usual[rule]


def _queue(waiting: Sequence[Queued]) -> list[tuple[str, int]]:
    """The jobs in Slurm's queue; where they are many, how many of each rule wait for the same reason."""
    jobs = {job.number: job for job in waiting}.values()
    if len(jobs) > FEW:
        return Counter(f"{job.rule}  {job.state} {job.about}" for job in jobs).most_common()
    return [(f"{f'{j.rule} {j.wildcards}'.strip()}  job {j.number}  {j.state} {j.about}", 1) for j in jobs]
