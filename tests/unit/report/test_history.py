"""The metrics of a training, thinned while they are read."""

from __future__ import annotations

from pathlib import Path

from snaketron.report.history import BLOCK, STRETCH, Series, read_history

import numpy as np
import orjson


def test_a_short_training_keeps_all_values():
    series = Series()
    series.add(np.arange(BLOCK), np.arange(BLOCK) % 5)
    assert series.points == [(step, float(step % 5)) for step in range(BLOCK)]


def test_a_long_training_keeps_the_first_the_last_and_the_spikes():
    """The value falls from 1 to 0 by 10 for each step; two of its values are a spike up and a spike down."""
    series, number = Series(), 3 * BLOCK + 1000
    values = [10.0 * (number - step) for step in range(number)]
    values[5000], values[3 * BLOCK + 500] = 1e9, -1e9
    for start in range(0, number, 1000):
        series.add(np.arange(number)[start : start + 1000], np.array(values[start : start + 1000]))
    points = series.points
    assert {(0, values[0]), (5000, 1e9), (3 * BLOCK + 500, -1e9), (number - 1, values[-1])} < {*points}
    assert points == sorted({*points}) and len(points) <= 2 * (
        number / STRETCH + 4
    )  # a block may end with a short stretch
    assert series.total == sum(values)
    # The first value of every stretch counts: their median lies half a stretch above that of all values.
    assert abs(series.median - 10.0 * number / 2) <= 10 * STRETCH
    series.add(np.array([number]), np.array([7.0]))  # after it was asked
    assert series.points[-1] == (number, 7.0) and series.total == sum(values) + 7


def test_what_is_no_metric_is_counted(tmp_path: Path):
    """Lines 2 to 5 of six; what follows the last end of a line is still being written."""
    good = [
        orjson.dumps({"iteration": step, "loss": 8.0 - step, "sources": {"a": {"loss": 2}}})
        for step in (1, 6)
    ]
    bad = [b'{"iteration": 2, "loss": NaN}', b'{"loss": 1.0}', b"[1]", b""]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([good[0], *bad, good[1], b'{"iterat']))
    history = read_history(tmp_path / "metrics.jsonl")
    assert (history.lines, history.done, history.unreadable) == (2, 6, [2, 3, 4, 5])
    loss, of_source = history.metrics.find("loss"), history.metrics.find("sources", "a", "loss")
    assert loss and loss.points == [(1, 7.0), (6, 2.0)]
    assert of_source and of_source.points == [(1, 2), (6, 2)]
    assert history.metrics.find("sources", "b", "loss") is None
