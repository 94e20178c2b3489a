"""The attempts at a version, and the files in which a training says how it fares."""

from __future__ import annotations

from pathlib import Path

from snaketron import files
from snaketron.jobs.attempts import Attempt, Attempts, read_attempts
from snaketron.jobs.heartbeat import read as read_beat
from snaketron.jobs.version import Description
from snaketron.log import UserError

import pytest


def test_attempts_are_written_as_they_are_read(tmp_path: Path):
    path = tmp_path / "attempts.json"
    assert read_attempts(path) == []
    attempts = Attempts("toy", path, 1)
    attempts.begin(4, "7")
    begun = files.read_json(path)[0]
    assert {name for name, value in begun.items() if value is None} == {
        *("outcome", "error", "seconds", "gave_up")
    }
    attempts.end("failed", 5, "ValueError: no")
    attempts.give_up("failed twice")
    (found,) = read_attempts(path)
    assert found == Attempt(
        begun["started"], "7", 4, 5, "failed", "ValueError: no", found.seconds, "failed twice"
    )


@pytest.mark.parametrize("text", ["", "null", "[1]", "{", '{"settings": 3}', '[{"outcome": ]'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str):
    path = tmp_path / "file"
    path.write_text(text)
    for read in (read_attempts, read_beat, Description.read):
        with pytest.raises(UserError, match=f"{path}: "):
            read(path)


def test_an_attempt_that_ended_without_a_word_counts(tmp_path: Path):
    """As when a node is lost: nobody could note how it ended."""
    for _ in range(2):
        Attempts("toy", tmp_path / "attempts.json", 1).begin(0, "7")
    with pytest.raises(UserError, match=r"toy: 2 starts in a row .* it ended without a word"):
        Attempts("toy", tmp_path / "attempts.json", 1).check(0)
    Attempts("toy", tmp_path / "attempts.json", 1).check(0)  # asked for by a person


def test_a_training_on_a_node_that_flaps_is_given_up_on(tmp_path: Path):
    """Slurm requeues it each time, before a checkpoint. A stop that a person asked for is not counted."""
    path = tmp_path / "attempts.json"
    for outcome in ("stopped", "requeued", "requeued"):
        attempts = Attempts("toy", path, 1)
        attempts.check(0)
        attempts.begin(0, "7")
        attempts.end(outcome, 0)
    with pytest.raises(UserError, match="2 starts in a row ended without a first checkpoint"):
        Attempts("toy", path, 1).check(0)
