"""A directory as a run leaves it on the way: its journal as Snakemake tells it, and its trainings."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from snaketron import files
from snaketron.graph.journal import Writer
from snaketron.graph.stops import Stops
from snaketron.sizes.outlook import Planned, Progress, planned

import orjson
from snakemake_interface_logger_plugins.common import LogEvent

# 196 steps of 1,000 tokens, without an earlier run that says how long they take; 90 at 50 tokens a second.
BROAD = {"pretrain/broad": planned(Progress(), 196, 1000, None)}
SFT = {"sft": planned(Progress(), 90, 1000, 50.0)}


class RunLog:
    """A run whose events are those of Snakemake."""

    def __init__(
        self, directory: Path, totals: dict[str, int], trainings: dict[str, Planned] | None = None
    ) -> None:
        self.writer = Writer(directory, totals, trainings or {}, Stops(lambda: False))

    def add(self, text: str, event: LogEvent | None = None, **extra: Any) -> None:
        made = logging.LogRecord("snakemake", logging.INFO, "", 0, text, None, None)
        made.__dict__.update(extra, event=event)
        self.writer.handle(made)

    def begins(
        self, number: int, rule: str, output: str = "a.json", *, log: str = "c.log", **wildcards: str
    ) -> None:
        job: dict[str, Any] = {"jobid": number, "rule_name": rule, "wildcards": wildcards}
        self.add("", LogEvent.JOB_INFO, output=[f"{output} (update)", "b.json"], log=[log], **job)

    def group(self, **jobs: int) -> None:
        """A group of jobs of these numbers; their names are what Snakemake may call it by."""
        members = [SimpleNamespace(jobid=n, uuid=lambda name=name: name) for name, n in jobs.items()]
        self.add("Group job tokens:", LogEvent.GROUP_INFO, jobs=members)

    def finishes(self, number: int) -> None:
        self.add(f"Finished jobid: {number}", LogEvent.JOB_FINISHED, job_id=number)

    def fails(self, *numbers: int, status: int | None = None) -> None:
        """A job fails, with the status of its command, or a group of several."""
        if len(numbers) > 1:
            self.add("Error", LogEvent.GROUP_ERROR, job_error_info=[{"jobid": n} for n in numbers])
            return
        if status is not None:
            said = f"CalledProcessError:\nCommand 'python train.py' returned non-zero exit status {status}."
            self.add(said, LogEvent.ERROR)
        self.add("Error", LogEvent.JOB_ERROR, jobid=numbers[0], shellcmd="python train.py", log=[])


def train(directory: Path, stage: str, steps: int, total: int, *, seconds_per_step: float = 2.0) -> Path:
    """A version that has trained so many steps, with a line of metrics for each ten; a warning at step 20."""
    version = directory / "ckpt/versions" / f"{stage.replace('/', '_')}-0123456789ab"
    version.mkdir(parents=True)
    files.write_json(version / "attempts.json", [{"started": "2026-11-28T20:56:40+00:00", "outcome": None}])
    said = {"iteration": steps, "train_iters": total, "loss": 4.5, "tokens_per_second": 500.0}
    files.write_json(version / "progress.json", said)
    lines: list[dict[str, Any]] = [{"iteration": 0, "valid_loss": 8.0}]
    for step in range(10, steps + 1, 10):
        line = {"iteration": step, "loss": 8 - step / 100, "timing": {"seconds": seconds_per_step * step}}
        lines.append(line)
    if steps >= 20:
        lines[2]["warnings"] = [{"kind": "spike", "text": "the loss rose to 9; look at the data"}]
    (version / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    return version
