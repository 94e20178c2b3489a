"""How far a training is, in a file."""

from __future__ import annotations

from pathlib import Path

from snaketron import files
from snaketron.jobs.heartbeat import Beat, Heartbeat
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
