"""The lines of a file that grows, such as metrics.jsonl: each is read once, however often one looks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

CHUNK = 1 << 20  # bytes that are read at a time


class Tail:
    """The lines of a file, each of them once, when it is complete."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.begun: tuple[int, int] | None = None  # the device and number of the file that was read
        self.offset = 0

    def changed(self) -> bool:
        """Whether another file lies there by now: then it is read from its beginning."""
        try:
            found = self.path.stat()
        except OSError:
            return False
        another = (found.st_dev, found.st_ino) != self.begun or found.st_size < self.offset
        if another:
            self.begun, self.offset = (found.st_dev, found.st_ino), 0
        return another

    def lines(self) -> Iterator[bytes]:
        """What was completed since the last call; nothing where there is no file."""
        try:
            file = self.path.open("rb")
        except OSError:
            return
        with file:
            file.seek(self.offset)
            rest = b""
            while chunk := file.read(CHUNK):
                *complete, rest = (rest + chunk).split(b"\n")
                self.offset += sum(len(line) + 1 for line in complete)
                yield from complete

    def rest(self) -> bytes:
        """What stands after the last complete line."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read()


def line_of_metrics(text: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None where it is no JSON, which has no NaN, or not such a line."""
    try:
        line = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return line if isinstance(line, dict) and _is_sound(line) else None


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines of metrics.jsonl, without a last one that is not finished, and how many are damaged."""
    complete = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    lines = [line for text in complete if (line := line_of_metrics(text))]
    return lines, len(complete) - len(lines)


def _is_sound(line: dict[str, Any]) -> bool:
    """Whether a line has a step, and what readers ask for by name has the type that trainings write."""
    timing = line.get("timing", {})
    if type(line.get("iteration")) is not int or not isinstance(timing, dict):  # True is an int, too
        return False
    said = line.get("warnings", []), timing.get("warnings", [])
    return (
        _is_number(line.get("loss"))
        and _is_number(timing.get("seconds"))
        and all(isinstance(found, list) and all(map(_is_warning, found)) for found in said)
    )


def _is_number(value: object) -> bool:
    """Or null, for one that is not finite."""
    return value is None or type(value) in (int, float)


def _is_warning(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("kind", "text"))
