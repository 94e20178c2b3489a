"""Lines of metrics over runs that are killed and continued."""

from __future__ import annotations

import time
from pathlib import Path

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
    assert Metrics.read(path) == [
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
    assert Metrics.read(path) == [line(2, 1.0)]
    Metrics(path, 2).write(**line(4, 2.0))
    assert path.read_text().count("\n") == 2 and Metrics.read(path) == [line(2, 1.0), line(4, 2.0)]


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
    assert [x.get("test_loss") for x in Metrics.read(path)] == [None, 3.0]


def test_no_file_is_no_lines(tmp_path: Path):
    assert Metrics.read(tmp_path / "metrics.jsonl") == []


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
