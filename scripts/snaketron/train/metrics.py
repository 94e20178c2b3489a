"""What a training reports: metrics as JSON lines, progress on the terminal."""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from snaketron.files import writing
from snaketron.jobs.lines import read_metrics
from snaketron.log import end_progress, logger, show_progress
from snaketron.wording import duration, plural

import orjson


class Metrics:
    """Appends one JSON object a line, whose values do not depend on how often a run was killed.

    Only those under `timing` do.
    """

    def __init__(
        self,
        path: Path,
        iteration: int,
        observe: Callable[[dict[str, Any]], None] = lambda line: None,
        *,
        writer: bool = True,
    ) -> None:
        """Open `path` as it was after `iteration` steps; later lines, of a killed run, are dropped.

        `observe` gets each line that is in the file, old ones first. All ranks may open it, and one is the
        `writer`: nothing happens on the others.
        """
        self.path, self.observe, self.writer = path, observe, writer
        lines, damaged = read_metrics(path)
        kept = [line for line in lines if line["iteration"] <= iteration and "test_loss" not in line]
        # Time is kept here and not in the checkpoints, whose bytes depend on nothing but the training.
        self.seconds = max((line["timing"]["seconds"] for line in kept if "timing" in line), default=0.0)
        self.has_validation = any("valid_loss" in line and line["iteration"] == iteration for line in kept)
        if not writer:
            return
        if damaged:
            logger.warning("%s: left out %s that a crash damaged", path, plural(damaged, "line"))
        with writing(path) as (temporary,):
            temporary.write_bytes(b"".join(orjson.dumps(k) + b"\n" for k in kept if iteration))
        for line in kept if iteration else ():
            observe(line)

    def write(self, **values: Any) -> None:
        """Add a line, which `observe` gets too; nothing where this is not the writer."""
        if not self.writer:
            return
        with self.path.open("ab") as file:
            file.write(orjson.dumps(values) + b"\n")
        self.observe(values)


def performance(lines: list[dict[str, Any]]) -> dict[str, float]:
    """How a training went: the median speed of a process, its peak of memory, and the seconds of activities.

    A checkpoint's time is in the line after it.
    """
    timings = [line["timing"] for line in lines if "step_seconds" in line.get("timing", {})]
    if not timings:
        return {}
    medians = ("tokens_per_second_per_process", "tflops_per_process")
    sums = ("step_seconds", "data_seconds", "checkpoint_seconds")
    return {
        **{key: statistics.median(t[key] for t in timings) for key in medians},
        "peak_memory_gib": max(t["peak_memory_gib"] for t in timings),
        **{key: round(sum(t[key] for t in timings), 2) for key in sums},
    }


def mix(lines: list[dict[str, Any]], wanted: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """What was trained of each source against what was wanted, and its last validation loss.

    `wanted` is that of `Batches`. Of a source that is `held_out` as a whole there is the loss alone. Nothing
    for a training without sources, or whose first steps were not reported by source.
    """
    if any("loss" in line and "sources" not in line for line in lines):
        return {}
    trained = [line["sources"] for line in lines if "sources" in line]
    valid = [line["valid_sources"] for line in lines if "valid_sources" in line]
    told = dict.fromkeys(key for line in trained for of_source in line.values() for key in of_source)
    sample = "samples" if "samples" in told else "packs"
    keys = [sample, *(key for key in ("conversations", "tokens", "trained_tokens") if key in told)]
    samples = sum(line[name][sample] for line in trained for name in line)
    sources = {}
    for name, (weight, there) in wanted.items():
        sums = {key: sum(line[name][key] for line in trained if name in line) for key in keys}
        sources[name] = {
            "weight": weight,
            "share": sums[sample] / max(1, samples),
            "epochs": round(sums[sample] / there, 4),
            **sums,
            "valid_loss": valid[-1].get(name) if valid else None,
        }
    held_out = {name: loss for name, loss in valid[-1].items() if name not in wanted} if valid else {}
    if not sources:
        return {}
    return {"sources": sources, **({"held_out": held_out} if held_out else {})}


class Clock:
    """Seconds of this process by what they were spent on, and the work that its steps were.

    `data` is a part of `step`: the time in which a step waited for its micro-batches.
    """

    def __init__(self, processes: int) -> None:
        """`processes` do the work together."""
        self.processes = processes
        self.spent = {"step": 0.0, "data": 0.0, "checkpoint": 0.0}
        self.last = dict(self.spent)
        self.tokens, self.flops = 0.0, 0.0  # since the last report

    @contextlib.contextmanager
    def spend(self, on: str) -> Iterator[None]:
        """Add the seconds within to those of `on`, a key of `spent`, also where an error ends them."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.spent[on] += time.monotonic() - began

    def waiting[T](self, items: Iterable[T]) -> Iterator[T]:
        """The items, with the time that each takes to come counted as data."""
        iterator = iter(items)
        while True:
            with self.spend("data"):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def worked(self, tokens: float, flops: float) -> None:
        """Count a step over so many tokens, of all processes, by its model FLOPs."""
        self.tokens, self.flops = self.tokens + tokens, self.flops + flops

    def report(self) -> dict[str, float]:
        """What happened since the last report."""
        since = {name: self.spent[name] - self.last[name] for name in self.spent}
        self.last = dict(self.spent)
        seconds = max(since["step"], 1e-9) * self.processes
        speed, rate = self.tokens / seconds, self.flops / seconds
        self.tokens = self.flops = 0.0
        return {
            "tokens_per_second_per_process": round(speed, 1),
            "tflops_per_process": round(rate / 1e12, 4),
            **{f"{name}_seconds": round(seconds, 3) for name, seconds in since.items()},
        }


class Progress:
    """One line on the terminal that says the stage, step, loss and time left.

    Where standard error is no terminal, a line every few seconds, and ever more rarely: a day of training is
    some 350 lines of a log.
    """

    INTERVAL = 5.0
    GROWTH = 0.02  # of the time since the first line

    def __init__(self, stage: str, total: int, tokens_per_step: int) -> None:
        self.stage, self.total, self.tokens_per_step = stage, total, tokens_per_step
        self.began: tuple[float, int] | None = None  # time and step of the first call
        self.shown = -math.inf
        self.terminal = sys.stderr.isatty()
        self.speed: float | None = None  # tokens a second since the first call

    def show(self, done: int, loss: float) -> None:
        """Show the line after `done` steps, if it is time for one; `loss` is in nats a token."""
        now = time.monotonic()
        self.began = self.began or (now, done)
        began, first = self.began
        if done == first:
            return  # the first step is slower than the others, and says nothing about the time left
        self.speed = self.tokens_per_step * (done - first) / (now - began)
        interval = 0.2 if self.terminal else max(self.INTERVAL, self.GROWTH * (now - began))
        if done < self.total and now - self.shown < interval:
            return
        self.shown = now
        left = duration(self.tokens_per_step * (self.total - done) / self.speed)
        where = f"{self.stage}  step {done}/{self.total}"
        show_progress(f"{where}  loss {loss:.4f}  {self.speed:,.0f} tokens/s  {left} left")
        if done == self.total:
            end_progress()
