"""Warnings from lines of metrics, with thresholds worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from snaketron.jobs.lines import read_metrics
from snaketron.tracking.warnings import Watch, warnings_of

import pytest


def line(iteration: int, loss: float = 3.0, norm: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"iteration": iteration, "loss": loss, "grad_norm": norm, **more}


def kinds(lines: list[dict[str, Any]], watch: Watch | None = None) -> list[tuple[int, str]]:
    """The warnings of a training with these lines."""
    watch, written = watch or Watch(largest_load=4.0), []
    for one in lines:
        written.append(watch.judged(one))
        watch.remember(written[-1])
    return [(warning.iteration, warning.kind) for warning in warnings_of(written)]


CALM = [line(i, loss=3.0 + 0.05 * (-1) ** i) for i in range(16)]  # from line to line it changes by 0.1


def test_a_loss_is_a_spike_above_eight_times_the_usual_change():
    """The median is 3, the usual change 0.1: the limit is 3.8. One warning, although the loss stays up."""
    assert kinds([*CALM, line(16, loss=3.79)]) == []
    assert kinds([*CALM, *(line(i, loss=3.81) for i in range(16, 20))]) == [(16, "spike")]
    flat = [line(i) for i in range(16)]  # which never changes: a tenth of a nat is nothing
    assert kinds([*flat, line(16, loss=3.09)]) == [] and kinds([*flat, line(16, loss=3.11)]) == [
        (16, "spike")
    ]
    assert kinds([*CALM[1:], line(16, loss=30.0)]) == []  # too little to compare with


def test_a_gradient_that_grows_or_jumps_comes_before_one_that_is_not_finite():
    assert kinds([*CALM, line(16, norm=2.0), line(17, norm=3.0), line(18, norm=4.1)]) == [(18, "gradient")]
    assert kinds([*CALM, line(16, norm=3.0), line(17, norm=2.0), line(18, norm=4.1)]) == []
    assert kinds([*CALM, line(16, norm=9.9)]) == [] and kinds([*CALM, line(16, norm=10.1)]) == [
        (16, "gradient")
    ]


@pytest.mark.parametrize(
    ("load", "lines", "found"),
    [
        ({"least": 0.0, "most": 1.5, "dead": 2}, 7, []),
        ({"least": 0.0, "most": 1.5, "dead": 2}, 9, [(7, "experts")]),
        # 8 experts of which a token visits 2: one with all tokens has 4 times the mean, the limit is 3.2.
        ({"least": 0.1, "most": 3.3, "dead": 0}, 7, []),
        ({"least": 0.1, "most": 3.3, "dead": 0}, 8, [(7, "experts")]),
        ({"least": 0.1, "most": 3.1, "dead": 0}, 9, []),
    ],
)
def test_experts_are_dead_or_overloaded_when_they_stay_so(load, lines, found):
    assert kinds([line(i, experts=load) for i in range(lines)]) == found


def test_the_number_of_dead_experts_is_said():
    watch = Watch()
    for i in range(8):
        judged = watch.judged(line(i, experts={"least": 0.0, "most": 1.5, "dead": 1 + i % 2}))
        watch.remember(judged)
    (warning,) = warnings_of([judged])
    assert warning.text.startswith(
        "2 experts got hardly a token, 8 lines in a row; look at model.moe_router_bias"
    )


def timed(iteration: int, waited: float = 0.0, **slowest: Any) -> dict[str, Any]:
    timing: dict[str, Any] = {"seconds": 4.0, "step_seconds": 4.0, "data_seconds": waited}
    return line(iteration, timing=timing | ({"slowest": slowest} if slowest else {}))


def test_time_is_lost_to_data_or_to_one_process():
    """A quarter of 4 s is 1 s. The lines of a process must name the same one."""
    assert kinds([timed(i, 1.1) for i in range(3)]) == [(2, "data")]
    assert kinds([timed(i, 0.9) for i in range(3)]) == []
    assert kinds([timed(0, 1.1), timed(1, 0.1), timed(2, 1.1)]) == []

    def slow(rank: int, lost: float = 0.5) -> dict[str, Any]:
        return {"rank": rank, "ratio": 1.25, "seconds_lost": lost, "data_seconds": 0.0}

    assert kinds([timed(i, **slow(3)) for i in range(3)]) == [(2, "rank")]
    assert kinds([timed(i, **slow(i)) for i in range(3)]) == []
    assert kinds([timed(i, **slow(3, lost=0.1)) for i in range(3)]) == []  # too short to matter


def test_a_continued_training_has_the_same_warnings_but_those_about_time_are_apart(tmp_path: Path):
    from snaketron.train.metrics import Metrics  # megatron-core, for this test alone

    path = tmp_path / "metrics.jsonl"
    lines = [*CALM, *(timed(i, 1.1) | {"loss": 9.0} for i in range(16, 20))]

    def train(first: int, last: int, watch: Watch) -> None:
        metrics = Metrics(path, first - 1 if first else 0, watch.remember)
        for one in lines[first:last]:
            metrics.write(**watch.judged(one))

    train(0, 20, Watch())
    whole = read_metrics(path)[0]
    assert [(w.iteration, w.kind) for w in warnings_of(whole)] == [(16, "spike"), (18, "data")]
    train(18, 20, Watch())  # killed, and continued after step 17
    assert read_metrics(path)[0] == whole
    assert [one["iteration"] for one in whole if "warnings" in one] == [16]  # without `timing`
