"""The process beside a training: it tells what happens, and the training waits for it for a bounded time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from snaketron.files import write_json, write_text
from snaketron.tracking import follow
from snaketron.tracking.follow import Follower, following
from snaketron.tracking.sinks import Run

import orjson
import psutil
import pytest


@pytest.fixture
def run(tmp_path: Path) -> Run:
    directory = tmp_path / "versions/sft-0123456789ab"
    directory.mkdir(parents=True)
    told = str(tmp_path / "told")
    command = [sys.executable, "-c", "import sys; open(sys.argv[1], 'a').write(sys.stdin.read())", told]
    return Run(directory, "sft", [], {}, notify=command, attempts=1)


def test_a_stall_is_told_once(run: Run, tmp_path: Path):
    """The process starts, sees how the second attempt of this job ended, and ends with the block."""
    write_json(run.version.attempts, [{"outcome": "hung"}])  # of an earlier job
    with following(run, {}, None):
        hung = {"outcome": "hung", "iteration": 4, "error": "no step within step_timeout (60 s)"}
        write_json(run.version.attempts, [{"outcome": "hung"}, hung, {"outcome": "finished"}])
        run.version.record.touch()  # the training has finished, so the block waits for all to be told
    told = json.loads((tmp_path / "told").read_text())
    assert (told["what"], told["stage"], told["error"]) == ("stalled", "sft", hung["error"])


def test_a_follower_that_hangs_is_left(run: Run, monkeypatch, caplog):
    monkeypatch.setattr(follow, "END_S", 1.0)
    run.version.record.touch()
    monkeypatch.setattr(follow, "PROGRAM", ["/bin/sleep", "1000"])
    before = set(psutil.Process().children())
    with following(run, {}, None):
        pass
    assert set(psutil.Process().children()) <= before  # one of an earlier test may have ended
    assert caplog.messages == [
        "sft: tracking did not end within 1 s and was left; `wandb sync` sends what W&B lacks"
    ]


def test_a_follower_that_was_killed_is_said(run: Run, monkeypatch, caplog):
    """By the kernel that had no memory left, say."""
    monkeypatch.setattr(follow, "PROGRAM", ["/bin/sh", "-c", "read order; kill -KILL $$"])
    with following(run, {}, None):
        pass
    assert caplog.messages == [
        "sft: tracking has died (status -9) and lacks what came after that, which metrics.jsonl has"
    ]


def test_nothing_is_started_where_there_is_nothing_to_tell(run: Run, tmp_path: Path):
    before = set(psutil.Process().children())
    with following(Run(run.directory, "sft", [], {}), {}, None):
        assert set(psutil.Process().children()) <= before


def test_tensorboard_has_the_numbers_of_the_file(run: Run):
    """The package itself reads them. A warning is no number, and a line of a replaced file is one event."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = [
        {"iteration": 0, "valid_loss": 7.5},
        {"iteration": 2, "loss": 6.5, "sources": {"docs": {"loss": 6.25}}},
    ]
    lines[1]["warnings"] = [{"kind": "spike", "text": "it rose"}]
    written = iter([lines[:1], lines, lines])

    def ended(seconds: float) -> bool:
        now = next(written, None)
        write_text(run.version.metrics, b"".join(orjson.dumps(line) + b"\n" for line in now or lines))
        return now is None

    tracked = Run(run.directory, "sft", [], {}, tensorboard=True)
    Follower(tracked).follow(ended)
    events = EventAccumulator(str(run.directory / "tensorboard"))
    events.Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {"valid_loss": [(0, 7.5)], "loss": [(2, 6.5)], "sources/docs/loss": [(2, 6.25)]}
