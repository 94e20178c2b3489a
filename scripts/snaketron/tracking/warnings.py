"""Warnings while training: what a line of metrics says that a person should look at.

They are found in the lines of `metrics.jsonl` and in nothing else. So they cost nothing, change nothing, and
a training that was killed and continued has the same ones. A warning stands in its line under `warnings`;
one about time under `timing`, with what differs from run to run. docs/tracking.md says why the limits are as
they are.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from snaketron.wording import plural

BEFORE = 16  # lines that a line is compared with
QUIET = 10  # lines after a warning in which another one of its kind is not said
SPIKE, SPIKE_NATS = 8.0, 0.1  # times the usual change from line to line; and nats at least
JUMP, GROWTH = 10.0, 4.0  # gradient norms over the median: of one line, and of the last of three that grow
IN_A_ROW = 3  # lines in which data are waited for, or a process is slow
UNEVEN_LINES = 8  # in a row, in which an expert is dead or overloaded
OVERLOAD, OVERLOAD_SHARE = 4.0, 0.8  # load over the mean; share of what is possible
DATA_SHARE, SLOW = 0.25, 1.2  # of a step spent on waiting for data; time over the median of the processes
LOST_S = 1.0  # seconds that waiting or a slow process has cost in these lines


@dataclass(frozen=True)
class Warning:
    """What to look at, in one line of text."""

    iteration: int
    kind: str  # spike, gradient, experts; data and rank are about time
    text: str


def warnings_of(lines: Iterable[Mapping[str, Any]]) -> list[Warning]:
    """The warnings in lines of metrics, in order."""
    return [
        Warning(line["iteration"], said["kind"], said["text"])
        for line in lines
        for part in (line, line.get("timing", {}))
        for said in part.get("warnings", ())
    ]


class Watch:
    """Looks at each line with losses before it is written, and remembers the last ones."""

    def __init__(self, largest_load: float = 1.0, processes_per_node: int = 1) -> None:
        """`largest_load` is the load of an expert that gets all tokens, over the mean of its layer."""
        self.overload = min(OVERLOAD, OVERLOAD_SHARE * largest_load)
        self.per_node = processes_per_node
        self.lines: list[Mapping[str, Any]] = []
        self.said: dict[str, int] = {}  # lines since a warning of a kind

    def remember(self, line: Mapping[str, Any]) -> None:
        """Take note of a line that is in the file."""
        if "grad_norm" not in line:
            return
        self.said = {kind: lines + 1 for kind, lines in self.said.items()}
        self.said |= dict.fromkeys((warning.kind for warning in warnings_of([line])), 0)
        self.lines = [*self.lines[1 - BEFORE :], line]

    def judged(self, line: dict[str, Any]) -> dict[str, Any]:
        """The line with its warnings."""
        of_time = list(self._named(data=self._data(line), rank=self._rank(line)))[:1]
        if of_time:
            line = line | {"timing": line["timing"] | {"warnings": of_time}}
        found = list(
            self._named(spike=self._spike(line), gradient=self._gradient(line), experts=self._experts(line))
        )
        return line | {"warnings": found} if found else line

    def _named(self, **texts: str | None) -> Iterator[dict[str, str]]:
        for kind, text in texts.items():
            if text and self.said.get(kind, QUIET) >= QUIET:
                yield {"kind": kind, "text": text}

    def _last(self, key: str) -> list[float]:
        return [line[key] for line in self.lines[-BEFORE:]]

    def _in_a_row(self, count: int, line: Mapping[str, Any], *path: str) -> list[Any] | None:
        """A value of the last `count` lines, this one the last; None where one of them lacks it."""
        values: list[Any] = [*self.lines[1 - count :], line]
        for name in path:
            values = [value.get(name) or {} for value in values]
        return values if len(values) == count and all(values) else None

    # -------------------------------------------------------------------------------------- the kinds

    def _spike(self, line: Mapping[str, Any]) -> str | None:
        before = self._last("loss")
        if len(before) < BEFORE:
            return None
        usual, change = statistics.median(before), statistics.median(abs(b - a) for a, b in pairwise(before))
        if line["loss"] - usual <= max(SPIKE * change, SPIKE_NATS):
            return None
        return (
            f"the loss rose to {line['loss']:.4f} from about {usual:.4f}; if it does not come back, look at "
            "the data of these steps and at the gradient norm before them, or lower the learning rate"
        )

    def _gradient(self, line: Mapping[str, Any]) -> str | None:
        before = self._last("grad_norm")
        if len(before) < BEFORE:
            return None
        usual, (first, second), norm = statistics.median(before), before[-2:], line["grad_norm"]
        grows = first < second < norm and norm > GROWTH * usual
        if not grows and norm <= JUMP * usual:
            return None
        what = "grows:" if grows else "jumped to"
        return (
            f"the gradient norm {what} {norm:.3g}, {norm / usual:.1f} times the usual {usual:.3g}; a loss "
            "that is not finite may follow: look at clip_grad, the learning rate and the precision"
        )

    def _experts(self, line: Mapping[str, Any]) -> str | None:
        rows = self._in_a_row(UNEVEN_LINES, line, "experts")
        if rows and all(row["dead"] for row in rows):
            return (
                f"{plural(rows[-1]['dead'], 'expert')} got hardly a token, {UNEVEN_LINES} lines in a row; "
                "look at model.moe_router_bias_update_rate and model.moe_aux_loss_coeff"
            )
        if rows and all(row["most"] > self.overload for row in rows):
            return (
                f"an expert gets {rows[-1]['most']:.1f} times the mean of its layer, {UNEVEN_LINES} lines in "
                "a row; look at model.moe_router_bias_update_rate, model.moe_aux_loss_coeff and learning_rate"
            )
        return None

    def _data(self, line: Mapping[str, Any]) -> str | None:
        rows = self._in_a_row(IN_A_ROW, line, "timing")
        if not rows or not all("step_seconds" in row for row in rows):
            return None
        waits = [row.get("slowest", {}).get("data_seconds", row["data_seconds"]) for row in rows]
        steps = [row["step_seconds"] for row in rows]
        if sum(waits) < LOST_S or any(w <= DATA_SHARE * s for w, s in zip(waits, steps, strict=True)):
            return None
        return (
            f"steps wait for data {sum(waits) / sum(steps):.0%} of their time; look at the disk that the "
            "data lie on and at cpus_per_task"
        )

    def _rank(self, line: Mapping[str, Any]) -> str | None:
        rows = self._in_a_row(IN_A_ROW, line, "timing", "slowest")
        if not rows or len({row["rank"] for row in rows}) > 1 or any(row["ratio"] < SLOW for row in rows):
            return None
        if sum(row["seconds_lost"] for row in rows) < LOST_S:
            return None
        node, place = divmod(rows[-1]["rank"], self.per_node)
        return (
            f"process {rows[-1]['rank']} (number {place} on node {node}) takes {rows[-1]['ratio']:.2f} "
            "times as long as its peers, which wait for it; look at its GPU's clock, temperature and errors "
            "(nvidia-smi -q), and at what else runs there"
        )
