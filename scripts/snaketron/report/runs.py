"""A run as its directory tells it, finished or not: trainings, rules, data, evaluations, environment."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from snaketron.config import Parallel
from snaketron.files import read_json
from snaketron.graph import process
from snaketron.graph.journal import Journal
from snaketron.graph.planned import Plan
from snaketron.jobs.attempts import Attempt, read_attempts, state_of
from snaketron.jobs.version import Version, versions
from snaketron.lineage.catalogue import read_all
from snaketron.lineage.record import Record, read
from snaketron.lineage.walk import ancestors, lost, why_lost
from snaketron.log import UserError
from snaketron.report.collect import Data, add_up, collect
from snaketron.report.history import History, read_history
from snaketron.report.workflow import Rule, rule_of, rules
from snaketron.wording import plural


@dataclass(frozen=True)
class Stage:
    """A training of a run: what it was told, how far it is, and what it said."""

    name: str
    version: Version
    state: str  # finished, running, waiting, failed, stopped
    reason: str  # why it is not finished
    settings: dict[str, Any]
    run: dict[str, Any]  # how it is run
    history: History  # its metrics and warnings
    attempts: list[Attempt]
    record: Record | None  # None until it is finished

    @property
    def done(self) -> int:
        """Steps that were trained."""
        return self.history.done

    @property
    def steps(self) -> int:
        return int(self.settings.get("train_iters", 0))

    @property
    def tokens(self) -> int:
        return int(max((value for _, value in self.values("consumed_train_tokens")), default=0))

    def values(self, *path: str) -> list[tuple[float, float]]:
        """A metric by step, of a long training thinned (`Series.points`); a path of two is within another."""
        found = self.history.metrics.find(*path)
        return found.points if found else []

    def last(self, *path: str) -> float | None:
        values = self.values(*path)
        return values[-1][1] if values else None

    def total(self, *path: str) -> float:
        """The sum of all values of a metric."""
        found = self.history.metrics.find(*path)
        return found.total if found else 0.0

    @property
    def processes(self) -> int:
        return Parallel.model_validate(self.run.get("parallel", {})).world_size

    @property
    def seconds(self) -> float:
        """Time of all its attempts; where one runs or ended without a word, at least that of its steps."""
        ended = sum(attempt.seconds or 0.0 for attempt in self.attempts)
        return max(ended, self.last("timing", "seconds") or 0.0)

    @property
    def on_gpus(self) -> bool:
        return bool(self.run.get("cluster", {}).get("gpus_per_node"))

    def answers(self) -> list[tuple[int, list[dict[str, str]]]]:
        """Answers by the step after which they were given."""
        return [
            (int(path.stem.removeprefix("step_")), read_json(path)) for path in self.version.all_answers()
        ]


@dataclass
class Run:
    """What a page tells about a directory.

    Args:
        plan: what the configuration would take (`graph.plan`); None where it is not known.
        changes: keys that differ from the defaults, with the default and the value.
    """

    name: str
    directory: Path
    stages: list[Stage]
    rules: dict[str, Rule]
    data: Data
    records: dict[Path, Record]
    evaluations: dict[str, dict[str, Any]]
    running: bool
    asked: Callable[[str], bool] = lambda log: True  # whether the configuration has the job of a log
    plan: Plan | None = None
    changes: list[tuple[str, Any, Any]] | None = None
    configfiles: list[str] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)  # what could not be read, and why

    def stage(self, name: str) -> Stage | None:
        return next((stage for stage in self.stages if stage.name == name), None)

    @cached_property
    def made(self) -> dict[str, Record]:
        """The records of the checkpoints on the page by their names, merged ones and averages included."""
        found = {stage.name: stage.record for stage in self.stages if stage.record}
        merged = (record for record in self.records.values() if is_merged(record))
        return found | {record.name: record for record in merged}

    def shown(self, name: str) -> str:
        """The key of the version that the page shows of a checkpoint; empty where it shows none."""
        if stage := self.stage(name):
            return stage.version.directory.name.rpartition("-")[2]
        record = self.made.get(name)
        return record.version.rpartition("-")[2] if record else ""

    @cached_property
    def planned(self) -> list[str]:
        """The trainings that the configuration asks for and that nobody began."""
        trainings = self.plan["trainings"] if self.plan else []
        names = [one["name"] for one in trainings if not one["on_request"]]
        return [name for name in names if not self.stage(name)]

    def is_asked(self, stage: Stage) -> bool:
        """Whether the configuration has a training: a phase that it does not train counts."""
        return self.asked(f"{stage.name}.log")

    @property
    def state(self) -> str:
        """finished, running, failed, stopped or not finished; a phase that was taken out does not count."""
        states = {stage.state for stage in self.stages if self.is_asked(stage)}
        states |= {rule.state for rule in self.rules.values()}
        if "running" in states or self.running:
            return "running"
        for state in ("failed", "stopped"):
            if state in states:
                return state
        return "not finished" if self.planned or states - {"finished"} or not states else "finished"


def read_run(
    directory: Path,
    roots: Mapping[str, str],
    plan: Plan | None,
    *,
    name: str,
    alone: bool,
    asked: Callable[[str], bool] = lambda log: True,
) -> Run:
    """Read what lies in a directory.

    Args:
        roots: those of `pathvars` that are not at their place.
        alone: nothing else works in the directory now, whatever its lock says.
        asked: whether the configuration has the job of a log (`graph.asked`).
    """
    at = {key: directory / roots.get(key, key) for key in ("data", "ckpt", "eval", "logs", "benchmarks")}
    trouble: list[str] = []
    running = not alone and process.is_running(directory)
    stages = read_stages(at["ckpt"], plan, trouble)
    with contextlib.chdir(directory):
        data, found = _read_data(Path(roots.get("data", "data")), at["ckpt"], stages, plan, trouble)
        records = {path.resolve(): record for path, record in found.items()}  # a version has links
    jobs = Counter(plan["jobs"] if plan else {})
    journal = Journal(directory)
    journal.look()
    run = Run(
        name=name,
        directory=directory,
        stages=stages,
        rules=_read_rules(directory, journal, at, jobs, records, running=running, asked=asked),
        data=data,
        records=records,
        evaluations=_read_evaluations(at["eval"], [stage.name for stage in stages], trouble),
        running=running,
        asked=asked,
        plan=plan,
        trouble=trouble,
    )
    for number, stage in enumerate(stages):
        log, rule = f"{stage.name}.log", run.rules.get(rule_of(stage.name))
        if rule is None or stage.state == "finished":
            continue
        if stage.state == "running" or rule.ended.get(log) != "failed":
            rule.ended[log] = stage.state
        elif stage.attempts and stage.attempts[-1].outcome is None:  # its supervisor alone was killed
            stages[number] = replace(stage, state="failed")
    for name, rule in run.rules.items():
        # The benchmark of a training is that of its last job, which may be one of many; attempts are of all.
        all_jobs = [stage.seconds for stage in stages if rule_of(stage.name) == name]
        if rule.seconds and sum(all_jobs) > sum(rule.seconds):
            rule.seconds = all_jobs
    return run


def _read_rules(
    directory: Path,
    journal: Journal,
    at: Mapping[str, Path],
    jobs: Counter[str],
    records: Mapping[Path, Record],
    *,
    running: bool,
    asked: Callable[[str], bool],
) -> dict[str, Rule]:
    """The rules that a run has or will have; one that is running may have been asked for further ones."""
    begun = None
    if running:
        jobs |= Counter(journal.totals)
        begun = {directory / job.log: job.began for job in journal.jobs.values() if job.state == "running"}
    return rules(
        directory,
        at["logs"],
        at["benchmarks"],
        jobs,
        records.values(),
        running=running,
        begun=begun,
        ended={directory / log: state for log, state in journal.ends(running=running).items()},
        asked=asked,
    )


# ------------------------------------------------------------------------------------------- trainings


def read_stages(ckpt: Path, plan: Plan | None, trouble: list[str]) -> list[Stage]:
    """The trainings of a directory, in the order of the workflow.

    A training may have several versions. Shown is the one that was begun or published last: settings that
    were trained before are only published again.
    """
    found: dict[str, Stage] = {}
    asked_for: dict[str, float] = {}
    for version in versions(ckpt):
        try:
            stage = _stage(version, trouble)
        except (OSError, ValueError, KeyError, UserError) as error:
            trouble.append(f"{version.directory} cannot be read: {error}")
            continue
        when = _asked_for(stage, ckpt) if stage else 0.0
        if stage and when >= asked_for.get(stage.name, 0.0):
            found[stage.name], asked_for[stage.name] = stage, when
    order = [one["name"] for one in plan["trainings"]] if plan else []
    return sorted(
        found.values(), key=lambda s: (order.index(s.name) if s.name in order else len(order), _began(s))
    )


def _asked_for(stage: Stage, ckpt: Path) -> float:
    """When a version was begun or published last, in seconds since 1970."""
    began, link = _began(stage), ckpt / stage.name
    times = [datetime.fromisoformat(began).timestamp() if began else 0.0]
    if link.is_symlink() and link.resolve() == stage.version.directory.resolve():
        times.append(link.lstat().st_mtime)
    return max(times)


def _began(stage: Stage) -> str:
    created = stage.record.created if stage.record else ""
    return stage.attempts[-1].started if stage.attempts else created


def _stage(version: Version, trouble: list[str]) -> Stage | None:
    """A training from its version directory; None where it has not said yet what it is told."""
    if not version.config.exists():
        return None
    told = version.describe()
    if not version.attempts.exists() or told.stage == "lora_merged":
        return None  # nothing is trained in it
    attempts = read_attempts(version.attempts)
    state, reason = state_of(version, attempts)
    history = read_history(version.metrics)
    if bad := history.unreadable:
        trouble.append(
            f"{version.metrics}: {len(bad):,} of {history.lines + len(bad):,} lines cannot be read and are "
            f"left out, the first of them line {bad[0]:,} (no JSON, which has null for NaN and Infinity, or "
            "values of other types than a training writes)."
        )
    return Stage(
        name=told.stage,
        version=version,
        state=state,
        reason=reason,
        settings=told.settings,
        run=told.run,
        history=history,
        attempts=attempts,
        record=read(version.record) if version.is_finished else None,
    )


# ------------------------------------------------------------------------------------------- the rest


def is_merged(record: Record) -> bool:
    """Whether it is that of a checkpoint that no training made."""
    return record.kind == "checkpoint" and (record.name == "lora_merged" or record.name.startswith("merged/"))


def _merged(ckpt: Path) -> dict[Path, Record]:
    """The records of checkpoints that no training made: adapters merged into their base, and averages."""
    found = [Version(link.resolve()).record for link in (ckpt / "lora_merged", *ckpt.glob("merged/*"))]
    return {path: read(path) for path in found if path.exists()}


def _read_data(
    root: Path, ckpt: Path, stages: Sequence[Stage], plan: Plan | None, trouble: list[str]
) -> tuple[Data, dict[Path, Record]]:
    """What the records say of the data, and all records: those of what was made last, else what there is."""
    phases = [one["name"].partition("/")[2] for one in plan["trainings"]] if plan else []
    phases = [phase for phase in phases if phase] or [path.name for path in sorted(root.glob("pretrain/*"))]
    last = [root / "pretrain" / phase / "index.json" for phase in phases] + [root / "sft/record.json"]
    try:
        trained = {stage.version.record: stage.record for stage in stages if stage.record}
        checkpoints = trained | _merged(ckpt)
        inputs = (entry for record in checkpoints.values() for entry in record.inputs)
        made = ancestors(inputs, of_others=False) | checkpoints
        trouble += [f"{entry.path}: {why_lost(entry)}." for entry in lost(made.values())]
        if all(path.is_file() for path in last):
            data = collect(last)
            if data.lacking:
                trouble.append(
                    f"Of the shards that the blends name, {plural(len(data.lacking), 'record')} cannot be "
                    f"counted (removed, damaged or made again since): {', '.join(data.lacking[:3])}."
                )
            return data, made | {path: read(path) for path in last}
        there = {made.path: made.record for made in read_all(sorted(root.rglob("*.json")))}
        data = collect([path for path in last if path.is_file()])
        every = add_up(there.values())
        every.mixes, every.indexed = data.mixes, data.indexed
        return every, made | there
    except (UserError, OSError, ValueError, KeyError, TypeError) as error:
        trouble.append(f"The records of the data cannot be followed: {error}")
        return Data(), {}


def _read_evaluations(root: Path, order: list[str], trouble: list[str]) -> dict[str, dict[str, Any]]:
    """Evaluations by checkpoint: trainings in their order, then what was merged."""
    found = {}
    for path in sorted([*root.glob("*.json"), *root.glob("pretrain/*.json"), *root.glob("merged/*.json")]):
        try:
            value = read_json(path)
            found[value["stage"]] = value
        except (OSError, ValueError, KeyError, TypeError) as error:
            trouble.append(f"{path} cannot be read: {error}")
    names = sorted(found, key=lambda name: order.index(name) if name in order else len(order))
    return {name: found[name] for name in names}
