"""Lines of metrics over runs that are killed and continued."""

from __future__ import annotations

import time
from pathlib import Path

from snaketron.jobs.lines import read_metrics
from snaketron.train import metrics
from snaketron.train.metrics import Metrics, Progress

import pytest


def line(iteration: int, seconds: float) -> dict:
    return {"iteration": iteration, "loss": 1.5, "timing": {"seconds": seconds}}


def test_a_killed_run_continues_after_its_last_checkpoint(tmp_path: Path):
    """Steps after the checkpoint at 4 are done again, so their lines are dropped."""
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, 0)
    metrics.write(iteration=0, valid_loss=7.0)
    for iteration in (2, 4, 6):
        metrics.write(**line(iteration, iteration / 2))
    again = Metrics(path, 4)
    assert again.seconds == 2.0  # of the steps that stay
    again.write(**line(6, 3.5))
    assert read_metrics(path)[0] == [
        {"iteration": 0, "valid_loss": 7.0},
        line(2, 1.0),
        line(4, 2.0),
        line(6, 3.5),
    ]


def test_a_line_that_a_killed_process_did_not_finish_is_left_out(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    Metrics(path, 0).write(**line(2, 1.0))
    with path.open("a") as file:
        file.write('{"iteration": 4, "los')
    assert read_metrics(path)[0] == [line(2, 1.0)]
    Metrics(path, 2).write(**line(4, 2.0))
    assert path.read_text().count("\n") == 2 and read_metrics(path)[0] == [line(2, 1.0), line(4, 2.0)]


def test_a_line_that_a_crash_of_the_node_damaged_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """What was not on the disk yet may be zeros: the training ended in an error whenever it was continued."""
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, 0)
    for iteration in (2, 4, 6):
        metrics.write(**line(iteration, iteration / 2))
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + bytes(len(second) // 2) + second[len(second) // 2 :] + third)
    again = Metrics(path, 6)
    assert caplog.messages == [f"{path}: left out 1 line that a crash damaged"]
    again.write(**line(8, 4.0))
    assert read_metrics(path)[0] == [line(2, 1.0), line(6, 3.0), line(8, 4.0)]


def test_a_run_without_a_checkpoint_begins_anew(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, 0)
    metrics.write(iteration=0, valid_loss=7.0)
    metrics.write(**line(2, 1.0))
    assert Metrics(path, 0).seconds == 0.0
    assert path.read_text() == ""


def test_the_test_loss_is_measured_again(tmp_path: Path):
    """A run killed after its last step, before its record, evaluates the test split once more."""
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, 0)
    metrics.write(**line(2, 1.0))
    metrics.write(iteration=2, test_loss=3.0)
    again = Metrics(path, 2)
    again.write(iteration=2, test_loss=3.0)
    assert [x.get("test_loss") for x in read_metrics(path)[0]] == [None, 3.0]


def test_no_file_is_no_lines(tmp_path: Path):
    assert read_metrics(tmp_path / "metrics.jsonl")[0] == []


def test_a_log_gets_lines_ever_more_rarely(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """Every 5 s at first; an hour after the first line every 72 s, 2 % of 3600."""
    progress = Progress("sft", total=10_000, tokens_per_step=100)
    for now, done in ((0.0, 1), (5.0, 2), (9.9, 3), (10.0, 4), (3600.0, 5), (3671.9, 6), (3674.0, 7)):
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        progress.show(done, 1.0)
    shown = [line.split()[2] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["2/10000", "4/10000", "5/10000", "7/10000"]


def test_progress_says_where_a_stage_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    progress = Progress("sft", total=5, tokens_per_step=100)
    for now, done, loss in (
        (100.0, 1, 2.0),  # the first step, which took long, says nothing
        (104.0, 3, 1.23456),  # two steps in four seconds: 50 tokens/s, two steps left
        (104.5, 4, 1.0),  # too soon for another line
        (105.0, 5, 0.5),  # but the last one is always shown
    ):
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        progress.show(done, loss)
    assert capsys.readouterr().err.splitlines() == [
        "sft  step 3/5  loss 1.2346  50 tokens/s  00:00:04 left",
        "sft  step 5/5  loss 0.5000  80 tokens/s  00:00:00 left",
    ]


def test_a_clock_reports_what_was_spent_since_the_last_report(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    clock = metrics.Clock(processes=2)

    def batches():
        for _ in range(2):
            now[0] += 0.25  # to read a micro-batch
            yield "batch"

    with clock.spend("step"):
        for _ in clock.waiting(batches()):
            now[0] += 1.75  # to compute with it
    with clock.spend("checkpoint"):
        now[0] += 6
    # 4 s for 8000 tokens on two processes: 1000 tokens/s on each, of 3 GFLOP.
    for _ in range(2):
        clock.worked(4_000, 4_000 * 3e9)
    assert clock.report() == {
        "tokens_per_second_per_process": 1000.0,
        "tflops_per_process": 3.0,
        "step_seconds": 4.0,
        "data_seconds": 0.5,
        "checkpoint_seconds": 6.0,
    }
    with clock.spend("step"):
        now[0] += 1
    clock.worked(1_000, 0)
    found = clock.report()
    assert (found["tokens_per_second_per_process"], found["data_seconds"]) == (500.0, 0.0)


def test_the_performance_of_a_training_is_that_of_its_lines():
    def line(speed, memory, step):
        timing = {"tokens_per_second_per_process": speed, "tflops_per_process": speed / 100}
        timing |= {"peak_memory_gib": memory, "step_seconds": step, "data_seconds": 0.5}
        return {"iteration": 1, "timing": timing | {"checkpoint_seconds": 2.0}}

    lines = [{"iteration": 0, "valid_loss": 7.0}, line(100, 3.0, 10), line(900, 4.5, 2), line(300, 4.5, 4)]
    assert metrics.performance(lines) == {
        "tokens_per_second_per_process": 300,
        "tflops_per_process": 3.0,
        "peak_memory_gib": 4.5,
        "step_seconds": 16,
        "data_seconds": 1.5,
        "checkpoint_seconds": 6.0,
    }
    assert metrics.performance(lines[:1]) == {}


def test_the_mix_is_what_was_trained_against_what_was_wanted():
    """20 packs, 12 of them of `a`, of which there are 8; `b` was not in the first line."""
    sums = {"conversations": 10, "tokens": 1000, "trained_tokens": 400}
    lines = [
        {"iteration": 0, "valid_sources": {"a": 6.0}},
        {"iteration": 2, "sources": {"a": {"packs": 4, **sums}}},
        {"iteration": 4, "sources": {"a": {"packs": 8, **sums}, "b": {"packs": 8, **sums}}},
        {"iteration": 4, "valid_sources": {"a": 5.5}},
    ]
    found = metrics.mix(lines, {"a": (0.5, 8), "b": (0.5, 100)})["sources"]
    twice = {"conversations": 20, "tokens": 2000, "trained_tokens": 800}
    assert found["a"] == {"weight": 0.5, "share": 0.6, "epochs": 1.5, "packs": 12, **twice, "valid_loss": 5.5}
    assert found["b"] == {"weight": 0.5, "share": 0.4, "epochs": 0.08, "packs": 8, **sums, "valid_loss": None}
    assert metrics.mix(lines, {}) == {}


def test_a_source_that_is_held_out_has_its_validation_loss_in_the_mix():
    lines = [
        {"iteration": 2, "sources": {"a": {"packs": 4}}},
        {"iteration": 2, "valid_sources": {"a": 5.5, "mine": 7.0}},
    ]
    found = metrics.mix(lines, {"a": (1.0, 8)})
    assert (found["held_out"], found["sources"].keys()) == ({"mine": 7.0}, {"a"})


def test_the_mix_of_corpora_counts_samples():
    """10 samples, 6 of them of `a`, that has 4.8; nothing where the first lines know no corpus."""
    a, b = ({"trained_tokens": 16 * samples, "samples": samples} for samples in (6, 4))
    lines = [
        {"iteration": 1, "loss": 5.0, "sources": {"a": {"loss": 5.0, **a}}},
        {"iteration": 2, "loss": 4.0, "sources": {"b": {"loss": 4.0, **b}}},
        {"iteration": 2, "valid_loss": 4.5, "valid_sources": {"a": 4.25}},
    ]
    wanted = {"a": (0.5, 4.8), "b": (0.5, 100.0)}
    assert metrics.mix(lines, wanted)["sources"] == {
        "a": {"weight": 0.5, "share": 0.6, "epochs": 1.25, **a, "valid_loss": 4.25},
        "b": {"weight": 0.5, "share": 0.4, "epochs": 0.04, **b, "valid_loss": None},
    }
    assert metrics.mix([{"iteration": 1, "loss": 6.0}, *lines], wanted) == {}
