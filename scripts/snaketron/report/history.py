"""What a training said while it ran: its metrics, read in a stream and thinned on the way.

A training of a million lines has some 800 MB of them. When each drawing went
through them as Python objects, a tenth of that took 13 s of CPU.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snaketron.jobs.lines import Tail, line_of_metrics
from snaketron.tracking.warnings import warnings_of

import numpy as np
from numpy.typing import NDArray

BLOCK = 8192  # values of a metric that are kept whole; then they are thinned
LINES = 512  # that are read at a time: as many as a processor's cache holds as objects
STRETCH = 128  # values of which a thinned metric keeps the lowest and the highest

type Numbers = NDArray[np.float64]
type Points = list[tuple[float, float]]


class Series:
    """One metric: all values, or, beyond `BLOCK` of them, the lowest and the highest of each stretch.

    The sum, the first and the last of the values are exact in any case.
    """

    def __init__(self) -> None:
        self._whole = np.empty((0, 2))  # steps and values that were not thinned yet
        self._thinned: Points = []
        self._even: list[float] = []  # the first value of each stretch
        self._total = 0.0
        self._first: Points = []

    def add(self, steps: Numbers, values: Numbers) -> None:
        self._whole = np.concatenate([self._whole, np.stack([steps, values], axis=1)])
        if len(self._whole) > BLOCK:
            self._thin()

    def _thin(self) -> None:
        """Thin all but the last value."""
        self._first = self._first or _points(self._whole[:1])
        block, self._whole = self._whole[:-1], self._whole[-1:]
        for start in range(0, len(block), STRETCH):
            values = block[start : start + STRETCH, 1]
            places = sorted({start + int(values.argmin()), start + int(values.argmax())})
            self._thinned += _points(block[places])
        self._even += block[::STRETCH, 1].tolist()
        self._total += float(block[:, 1].sum())

    @property
    def total(self) -> float:
        return self._total + float(self._whole[:, 1].sum())

    @property
    def points(self) -> Points:
        """Values by step: the first and the last, and the lowest and the highest of each stretch."""
        if self._thinned and len(self._whole) > 1:
            self._thin()  # else the last stretch would have more points than all before it
        first = [] if self._first == self._thinned[:1] else self._first
        return [*first, *self._thinned, *_points(self._whole)]

    @property
    def median(self) -> float:
        """The median of the values; of a thinned metric that of evenly chosen ones."""
        return float(np.median([*self._even, *self._whole[:, 1].tolist()]))


def _points(rows: Numbers) -> Points:
    return [(step, value) for step, value in rows.tolist()]


class Group:
    """The metrics of an object of JSON by their keys, and the objects within it."""

    def __init__(self) -> None:
        self.series: defaultdict[str, Series] = defaultdict(Series)
        self.parts: defaultdict[str, Group] = defaultdict(Group)

    def add(self, steps: Numbers, rows: Sequence[dict[str, Any]]) -> None:
        """Add such objects. Key by key is three times as fast as row by row."""
        for key in dict.fromkeys(itertools.chain.from_iterable(rows)):
            column = [row.get(key) for row in rows]
            try:
                values = np.array(column, dtype=np.float64).reshape(len(rows))
            except (TypeError, ValueError):  # not only numbers and null
                values = np.array([v if isinstance(v, int | float) else None for v in column], np.float64)
                if inner := {place: value for place, value in enumerate(column) if isinstance(value, dict)}:
                    self.parts[key].add(steps[[*inner]], [*inner.values()])
            if (found := ~np.isnan(values)).any():  # null becomes NaN
                self.series[key].add(steps[found], values[found])

    def find(self, *path: str) -> Series | None:
        """The metric with this path; None where no line had it."""
        group = self
        for name in path[:-1]:
            if name not in group.parts:
                return None
            group = group.parts[name]
        return group.series.get(path[-1])


class History:
    """The metrics of a training, and what it warned of."""

    def __init__(self) -> None:
        self.metrics = Group()
        self.lines = 0
        self.done = 0  # steps that were trained
        self.warnings: list[str] = []
        self.unreadable: list[int] = []  # numbers of lines that are no metrics, from 1

    def add(self, lines: Sequence[dict[str, Any]]) -> None:
        steps = [line["iteration"] for line in lines]
        self.lines += len(lines)
        self.done = max(self.done, *steps)
        self.metrics.add(np.array(steps, dtype=np.float64), lines)
        self.warnings += [f"step {said.iteration}: {said.text}" for said in warnings_of(lines)]


def read_history(path: Path) -> History:
    """Read metrics.jsonl; its last line may still be being written, and is left out then."""
    history = History()
    numbered = enumerate(Tail(path).lines(), start=1)
    for block in itertools.batched(numbered, LINES):
        lines = []
        for number, text in block:
            if line := line_of_metrics(text):
                lines.append(line)
            else:
                history.unreadable.append(number)
        if lines:
            history.add(lines)
    return history
