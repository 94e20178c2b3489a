"""A directory as a run leaves it on the way: its log as Snakemake writes it, and its trainings."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from snaketron import files
from snaketron.sizes.outlook import Progress, outlook

import orjson
from snakemake.logging import DefaultFormatter
from snakemake_interface_logger_plugins.common import LogEvent

LOG = ".snakemake/log/2026-11-28T205240.183890.snakemake.log"
# 196 steps of 1,000 tokens, without an earlier run that says how long they take; 90 at 50 tokens a second.
BROAD = f"pretrain/broad     {outlook(Progress(), 196, 1000, None)}"
SFT = f"sft                {outlook(Progress(), 90, 1000, 50.0)}"


class RunLog:
    """The log of a run, in the words of Snakemake's own formatter."""

    def __init__(self, directory: Path, totals: dict[str, int], *said: str, name: str = LOG) -> None:
        self.path = directory / name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.words = DefaultFormatter(None, True)
        self.add("\nSNAKEMAKE\n=========\n  Date: " + time.strftime("%Y-%m-%d %H:%M:%S"))
        rows = "".join(f"{rule:20} {count:6}\n" for rule, count in (totals | {"total": 0}).items())
        self.add(f"Job stats:\njob                   count\n------------------  -------\n{rows}")
        for line in said:
            self.add(line)

    def add(self, text: str, event: LogEvent | None = None, **extra: Any) -> None:
        made = logging.LogRecord("snakemake", logging.INFO, "", 0, text, None, None)
        made.__dict__.update(extra, event=event)
        with self.path.open("a") as file:
            file.write(self.words.format(made) + "\n")

    def begins(
        self,
        number: int,
        rule: str,
        output: str = "a.json",
        *,
        grouped: bool = False,
        log: str = "c.log",
        **wildcards: str,
    ) -> None:
        job: dict[str, Any] = {"jobid": number, "rule_name": rule, "wildcards": wildcards, "indent": grouped}
        job |= {
            "rule_msg": None,
            "local": not grouped,
            "is_checkpoint": False,
            "input": ["b"],
            "log": [log],
        }
        job |= {"output": [output], "benchmark": None, "reason": "Missing", "priority": 0, "threads": 1}
        self.add("", LogEvent.JOB_INFO, resources={}, **job)

    def finishes(self, number: int, rule: str) -> None:
        self.add(f"Finished jobid: {number} (Rule: {rule})", LogEvent.JOB_FINISHED)

    def fails(self, number: int, rule: str, *logs: str, command: str = "python x.py") -> None:
        error: dict[str, Any] = {"jobid": number, "rule_name": rule, "rule_msg": None, "log": list(logs)}
        error |= {"input": [], "output": ["a.json"], "conda_env": None, "shellcmd": command, "aux": {}}
        made = {"indent": False, **error}
        self.add(f"Error in rule {rule}", LogEvent.JOB_ERROR, msg="", **made)


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
