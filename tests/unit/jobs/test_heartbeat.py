"""How far a training is, in a file."""

from __future__ import annotations

import os
from pathlib import Path

from snaketron import files
from snaketron.jobs.heartbeat import Beat, Heartbeat, touch
from snaketron.jobs.heartbeat import read as read_beat


def test_a_heartbeat_keeps_the_loss_and_the_speed_of_before(tmp_path: Path):
    path = tmp_path / "progress.json"
    assert read_beat(path) is None
    heartbeat = Heartbeat(path, 3, writer=True)
    heartbeat.beat(1)
    assert files.read_json(path) == {"iteration": 1, "train_iters": 3}
    heartbeat.beat(2, loss=5.25, tokens_per_second=50.0)
    heartbeat.beat(3)
    assert read_beat(path) == Beat(3, 3, 5.25, 50.0)


def test_a_heartbeat_goes_on_between_two_steps(tmp_path: Path):
    path = tmp_path / "progress.json"
    heartbeat = Heartbeat(path, 3, writer=True)
    heartbeat.beat(3, loss=5.25)
    before = path.stat().st_mtime_ns
    heartbeat.alive()  # within a second of the last word
    assert path.stat().st_mtime_ns == before
    heartbeat.written -= 1.0
    heartbeat.alive()
    assert path.stat().st_mtime_ns > before and read_beat(path) == Beat(3, 3, 5.25)


def test_who_works_behind_the_last_step_touches_the_heartbeat(tmp_path: Path):
    path = tmp_path / "progress.json"
    touch(path)
    assert not path.exists()
    Heartbeat(path, 3, writer=True).beat(3)
    os.utime(path, (0, 0))
    touch(path)
    assert path.stat().st_mtime > 0 and read_beat(path) == Beat(3, 3)
