"""A file that grows: complete lines come once, and anew when another file takes its place."""

from __future__ import annotations

from pathlib import Path

from snaketron import files
from snaketron.tracking.lines import Tail


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
