"""How a run was set up: the configuration and what differs from the defaults, software, hardware, git."""

from __future__ import annotations

import platform
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snaketron.lineage.diff import flat
from snaketron.lineage.provenance import commit, hardware, machine
from snaketron.report.blocks import UNKNOWN, Block, Facts, Folded, Part, Table, Text
from snaketron.report.measured import across
from snaketron.report.runs import Run, Stage

MAX_CHARACTERS = 160  # of a value


def _shown(value: Any) -> str:
    text = UNKNOWN if value is None else str(value)
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}…"


def configuration_part(runs: Sequence[Run]) -> Part:
    """What differs from the defaults, what differs between the runs, and every setting of the trainings."""
    blocks = _between(runs) if len(runs) > 1 else []
    for run in runs:
        files = " and ".join(run.configfiles) or "config/config.yaml alone"
        if run.changes is None:
            blocks.append(Text(f"{run.name}: its configuration is not known, only what trainings were told."))
        elif not run.changes:
            blocks.append(Text(f"{run.name}: all values are the defaults ({files})."))
    header = ["key", "default", "here"]
    blocks += across(
        "What differs from the defaults",
        header,
        runs,
        lambda run: [[key, _shown(old), _shown(new)] for key, old, new in run.changes or []],
        names=3,
    )
    for run in runs:
        named = f" in {run.name}" if len(runs) > 1 else ""
        for stage in run.stages:
            rows = [[key, _shown(value)] for key, value in _told(stage).items()]
            table = Table(f"Settings of {stage.name}{named}", ["setting", "value"], rows, names=2)
            blocks.append(Folded(f"All settings of {stage.name}{named}", [table]))
    return Part("Configuration", blocks)


def _told(stage: Stage) -> dict[str, Any]:
    return flat(stage.settings) | {f"run.{key}": value for key, value in flat(stage.run).items()}


def _between(runs: Sequence[Run]) -> list[Block]:
    """The settings of trainings that are not the same in all runs that have the training."""
    rows = []
    for name in dict.fromkeys(stage.name for run in runs for stage in run.stages):
        told = [_told(stage) if (stage := run.stage(name)) else {} for run in runs]
        for key in dict.fromkeys(key for one in told for key in one):
            values = [_shown(one[key]) if key in one else UNKNOWN for one in told]
            if len({value for value, one in zip(values, told, strict=True) if one}) > 1:
                rows.append([name, key, *values])
    if not rows:
        return [Text("The trainings that the runs share have the same settings.")]
    header = ["training", "setting", *(run.name for run in runs)]
    return [Table("What the runs were told differently", header, rows, names=len(header))]


def environment_part(runs: Sequence[Run], date: str) -> Part:
    """Versions that decided on results, as the records have them; the code, and the machine of the page."""
    versions = [_versions(run) for run in runs]
    rows = [
        [name, *(one.get(name) or UNKNOWN for one in versions)]
        for name in dict.fromkeys(name for one in versions for name in one)
    ]
    blocks: list[Block] = []
    if rows:
        columns = ["version"] if len(runs) == 1 else [run.name for run in runs]
        blocks.append(
            Table("Versions, by the last record", ["package", *columns], rows, names=1 + len(columns))
        )
    header = ["code", "hardware", "made"]
    blocks += across("Code and hardware, by the records", header, runs, _made_where, names=4)
    rows = [[run.name, *git(run.directory)] for run in runs]
    blocks.append(Table("Code in the directory now", ["run", "commit", "changed files"], rows, names=3))
    here = f"{machine(hardware())}, {platform.system()} {platform.release()}"
    blocks.append(Facts([("This page was made", date), ("on", here)]))
    return Part("Environment", blocks)


def _made_where(run: Run) -> list[list[str]]:
    """The code and the hardware that made artifacts, with the kinds of these artifacts."""
    made: dict[tuple[str, str], dict[str, None]] = defaultdict(dict)
    for record in run.records.values():
        about = record.provenance
        code = commit(about["code"]) if about.get("code") else UNKNOWN
        hardware = machine(about["hardware"]) if about.get("hardware") else UNKNOWN
        kind = record.name if record.kind == "checkpoint" else record.kind.replace("_", " ")
        made[code, hardware][kind] = None
    return [[*where, ", ".join(kinds)] for where, kinds in made.items() if where != (UNKNOWN, UNKNOWN)]


def _versions(run: Run) -> dict[str, str | None]:
    records = sorted(run.records.values(), key=lambda record: record.created)
    return dict(records[-1].versions) if records else {}


def git(directory: Path) -> list[str]:
    """The commit that is checked out, and which files differ from it; dashes outside of git."""

    def ask(*arguments: str) -> str | None:
        try:
            command = ["git", "-C", str(directory), *arguments]
            done = subprocess.run(
                command, capture_output=True, encoding="utf-8", errors="replace", timeout=60
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = ask("log", "-1", "--format=%h of %cs, %s")
    if head is None:
        return [UNKNOWN, UNKNOWN]
    changed = (ask("status", "--porcelain", "--untracked-files=no") or "").splitlines()
    return [head, ", ".join(line[2:].strip() for line in changed[:10]) or "none"]
