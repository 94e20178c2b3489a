"""Where the files that a record names lie now: its directory may have been moved, or is another one."""

from __future__ import annotations

import functools
import itertools
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from snaketron.lineage.record import Entry, Record

NEAR = 2  # a record lies at most so many directories below one that it shares with its outputs


@dataclass(frozen=True, eq=False)
class Placed:
    """Where a record lies, and what it says."""

    path: Path
    record: Record

    @cached_property
    def moved(self) -> tuple[str, str]:
        """The beginning of the paths that the record gives to its outputs, and what it is now."""
        output = self.record.outputs[0].file if self.record.outputs else Path()
        return _moved(self.path.parent, output.parent)

    def output_place(self, entry: Entry) -> Path:
        """Where an output lies now, if it is there."""
        before, now = self.moved
        path = entry.path
        moves = path.startswith(before) and (before or not path.startswith("/"))
        return Path(now + path.removeprefix(before)) if moves else entry.file

    def place(self, entry: Entry) -> Path:
        """Where an input or an output lies now: beside what was made, unless only that was moved."""
        moved = self.output_place(entry)
        return moved if moved.exists() or not entry.file.exists() else entry.file

    def placed(self, entry: Entry) -> Entry:
        """An input with the path where it lies now."""
        return replace(entry, path=str(self.place(entry)))

    @property
    def is_of_here(self) -> bool:
        """Whether the paths in the record are those of the working directory of now."""
        before, now = map(Path, self.moved)
        return before.resolve() == now.resolve()


@functools.cache
def _moved(here: Path, there: Path) -> tuple[str, str]:
    """The beginning of the paths in a record, and what it is now, each with a `/` at its end.

    A record lies near its outputs, so the directories of both have a part in common: of `data/docs` in a
    record below `/copy/data/docs` it is all, and what was the working directory is `/copy/`.

    Args:
        here: where the record lies.
        there: where it says that its outputs lie.
    """
    now, then = here.parts, there.parts
    begin = int(there.is_absolute())  # after the `/`
    found = []  # parts in common, and where they begin
    for i, j in itertools.product(range(begin, len(then)), range(begin, len(now))):
        pairs = zip(then[i:], now[j:], strict=False)
        length = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        if length and len(now) - j - length <= NEAR:
            found.append((-length, i, j))
    ways = [(Path(*then[:i]), Path(*now[:j])) for _, i, j in sorted(found)]
    leading = (way for way in ways if (way[1] / there.relative_to(way[0])).is_dir())
    before, after = next(leading, ways[0] if ways else (Path(), Path()))
    return _beginning(before), _beginning(after)


def plain(path: Path) -> Path:
    """The whole path without `..`; links are not followed, which would ask the file system."""
    return Path(os.path.normpath(path.absolute()))


def _beginning(path: Path) -> str:
    return "" if path == Path() else f"{path}/".replace("//", "/")
