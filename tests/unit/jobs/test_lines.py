"""A file that grows: complete lines come once, and anew when another file takes its place."""

from __future__ import annotations

from pathlib import Path

from snaketron import files
from snaketron.jobs.lines import Tail, line_of_metrics

import orjson
import pytest

SOUND = {
    "iteration": 3,
    "loss": 2.5,
    "timing": {"seconds": 1, "warnings": [{"kind": "rank", "text": "slow"}]},
}


def test_a_line_that_is_being_written_is_read_when_it_is_complete(tmp_path: Path):
    path = tmp_path / "a.log"
    tail = Tail(path)
    assert list(tail.lines()) == []
    path.write_text("one\ntw")
    assert tail.changed() and list(tail.lines()) == [b"one"]
    with path.open("a") as file:
        file.write("o\n")
    assert not tail.changed() and list(tail.lines()) == [b"two"]
    files.write_text(path, "one\n")  # as a training does that goes on from a checkpoint
    assert tail.changed() and list(tail.lines()) == [b"one"]


def test_a_line_of_metrics_has_a_step_and_may_lack_the_rest():
    for line in (SOUND, {"iteration": 3}, SOUND | {"loss": None, "timing": {"seconds": None}}):
        assert line_of_metrics(orjson.dumps(line)) == line


@pytest.mark.parametrize(
    "wrong",
    [
        {"iteration": "3"},
        {"iteration": True},
        {"iteration": 3.5},
        {"loss": "2.5"},
        {"loss": [2.5]},
        {"loss": False},
        {"timing": None},
        {"timing": [1]},
        {"timing": {"seconds": "1"}},
        {"timing": {"warnings": 1}},
        {"warnings": None},
        {"warnings": "spike"},
        {"warnings": {"kind": "spike", "text": "up"}},
        {"warnings": [1]},
        {"warnings": [{"kind": "spike"}]},
        {"warnings": [{"kind": "spike", "text": 1}]},
    ],
)
def test_a_line_with_values_of_other_types_is_none_of_metrics(wrong: dict[str, object]):
    assert line_of_metrics(orjson.dumps(SOUND | wrong)) is None
