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
    """A line of metrics.jsonl; None where it is no JSON, which has no NaN, or has no step."""
    try:
        line = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("iteration"), int) else None
