"""The files in which a training says how its attempts ended, how far it is, and what it is."""

from __future__ import annotations

from pathlib import Path

from snaketron import files
from snaketron.jobs.attempts import Attempt, Attempts, read_attempts
from snaketron.jobs.heartbeat import Beat, Heartbeat
from snaketron.jobs.heartbeat import read as read_beat
from snaketron.jobs.version import Description
from snaketron.lineage.record import Entry
from snaketron.log import UserError

import pytest
import yaml


def test_attempts_are_written_as_they_are_read(tmp_path: Path):
    path = tmp_path / "attempts.json"
    assert read_attempts(path) == []
    attempts = Attempts("toy", path, 1)
    attempts.begin(4, "7")
    begun = files.read_json(path)[0]
    assert list(begun) == ["started", "job", "from_iteration", "iteration", "outcome", "error"]
    attempts.end("failed", 5, "ValueError: no")
    attempts.give_up("failed twice")
    (found,) = read_attempts(path)
    assert found == Attempt(
        begun["started"], "7", 4, 5, "failed", "ValueError: no", found.seconds, "failed twice"
    )
    assert files.read_json(path)[0].keys() - begun.keys() == {"seconds", "gave_up"}


def test_a_heartbeat_keeps_the_loss_and_the_speed_of_before(tmp_path: Path):
    path = tmp_path / "progress.json"
    assert read_beat(path) is None
    heartbeat = Heartbeat(path, 3, writer=True)
    heartbeat.beat(1)
    assert files.read_json(path) == {"iteration": 1, "train_iters": 3}
    heartbeat.beat(2, loss=5.25, tokens_per_second=50.0)
    heartbeat.beat(3)
    assert read_beat(path) == Beat(3, 3, 5.25, 50.0)


def test_a_description_is_written_as_it_is_read(tmp_path: Path):
    """What was not trained here says neither how it was run nor an order of samples."""
    path, inputs = (
        tmp_path / "config.yaml",
        (Entry("", "data/blend.json", "ab"), Entry("", "ckpt/base", version="b-1")),
    )
    Description({"stage": "sft"}, inputs, "cd").write(path)
    written = yaml.safe_load(path.read_text())
    assert list(written) == ["settings", "inputs", "tokenizer_sha256"]
    assert written["inputs"] == [
        {"path": "data/blend.json", "sha256": "ab"},
        {"path": "ckpt/base", "version": "b-1"},
    ]
    found = Description.read(path)
    assert (found.stage, [*found.inputs], found.run, found.order) == ("sft", [*inputs], {}, None)
    Description(found.settings, inputs, "cd", {"log_interval": 2}, "by epoch", {"iteration": 5}).write(path)
    names = ["settings", "run", "inputs", "tokenizer_sha256", "order", "continues"]
    assert list(yaml.safe_load(path.read_text())) == names
    assert Description.read(path).continues == {"iteration": 5}


@pytest.mark.parametrize("text", ["", "null", "[1]", "{", '{"settings": 3}', '[{"outcome": ]'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str):
    path = tmp_path / "file"
    path.write_text(text)
    for read in (read_attempts, read_beat, Description.read):
        with pytest.raises(UserError, match=f"{path}: "):
            read(path)
