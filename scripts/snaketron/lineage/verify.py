"""Whether the files behind an artifact still are those that the records name, by their hashes.

A file is read once for each state of it: what was found is kept in a small file of the working directory, by
size and time. So a check that was interrupted goes on where it was, and the next one reads what changed.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snaketron.files import directory_sha256, read_json, sha256, shown, write_text
from snaketron.lineage.catalogue import Catalogue, Made
from snaketron.lineage.tree import is_file, trouble
from snaketron.log import UserError, end_progress, logger, show_progress
from snaketron.wording import plural, size_text

import orjson

STATE = ".lineage-verified.json"
SAVE_EVERY_S = 10.0
SHOW_EVERY_S = 1.0


@dataclass(frozen=True)
class Named:
    """A file, or a directory of files, that a record names."""

    path: Path
    sha256: str
    by: Path  # the record
    problem: str = ""  # that is known without reading it


@dataclass
class Found:
    """What a check found."""

    read: int = 0  # files that were read
    bytes: int = 0  # of them
    unchanged: int = 0  # that were read before, and have the size and time of then
    problems: list[str] = field(default_factory=list)

    @property
    def told(self) -> str:
        files = self.read + self.unchanged
        read = f"{plural(files, 'file')}: {self.read} read ({size_text(self.bytes)})"
        problems = plural(len(self.problems), "problem")
        return f"{read}, {self.unchanged} unchanged since they were read; {problems}"


def named(catalogue: Catalogue, made: Made) -> Iterator[Named]:
    """The outputs of all jobs behind an artifact, and the files that they began with; each once."""
    seen: set[tuple[str, str]] = set()
    for one in catalogue.ancestors(made):
        for entry in one.record.outputs:
            path = one.output_place(entry)
            if entry.sha256 and (key := (str(path), entry.sha256)) not in seen:
                seen.add(key)
                yield Named(path, entry.sha256, one.path)
        for entry in one.record.inputs:
            if catalogue.made_by(entry, one) or not is_file(entry):
                continue
            path = one.place(entry)
            if (key := (str(path), entry.sha256)) not in seen:
                seen.add(key)
                yield Named(path, entry.sha256, one.path, trouble(catalogue, one, entry))


class State:
    """The hashes of files by path, size and time, and since when a check of all of them goes on."""

    def __init__(self, path: Path, *, all_again: bool) -> None:
        self.path, self.all_again = path, all_again
        try:
            value = read_json(path)
            self.files: dict[str, list[Any]] = value["files"]
            self.since: float | None = value["all_since"]
        except (OSError, ValueError, KeyError, TypeError):
            self.files, self.since = {}, None
        if all_again and self.since is None:
            self.since = time.time()
        self._saved = time.monotonic()

    def known(self, path: Path, state: tuple[int, int]) -> str | None:
        """The hash of a file in a state (size, time); None where it has to be read."""
        size, modified, digest, when = self.files.get(str(path), (None, None, None, 0.0))
        if (size, modified) != state or (self.all_again and self.since and when < self.since):
            return None
        return digest

    def add(self, path: Path, state: tuple[int, int], digest: str) -> None:
        self.files[str(path)] = [*state, digest, time.time()]
        if time.monotonic() - self._saved > SAVE_EVERY_S:
            self.save()

    def save(self, *, finished: bool = False) -> None:
        """Write it aside and rename it; one that cannot be written only means reading again."""
        since = None if finished and self.all_again else self.since
        try:
            write_text(self.path, orjson.dumps({"all_since": since, "files": self.files}))
        except (OSError, UserError) as error:
            logger.warning("%s: cannot be written (%s); the next check reads all again", self.path, error)
        self._saved = time.monotonic()


def verify(files: Iterable[Named], state: State, *, workers: int | None = None) -> Found:
    """Compare files with their records; reads several at a time."""
    found, waiting = Found(), {}
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        try:
            for one in files:
                now = _state(one.path)
                if one.problem or now is None:
                    found.problems.append(_problem(one, one.problem or "missing"))
                elif (known := state.known(one.path, now)) is None:
                    waiting[pool.submit(_hash, one.path)] = one, now
                else:
                    found.unchanged += 1
                    _compare(one, known, found)
            shown = time.monotonic()
            for number, job in enumerate(as_completed(waiting), 1):
                one, now = waiting[job]
                try:
                    digest = job.result()
                except OSError as error:
                    found.problems.append(_problem(one, f"cannot be read ({error.strerror})"))
                    continue
                found.read, found.bytes = found.read + 1, found.bytes + now[0]
                state.add(one.path, now, digest)
                _compare(one, digest, found)
                if time.monotonic() - shown > SHOW_EVERY_S:
                    show_progress(f"{number:,} of {len(waiting):,} files, {size_text(found.bytes)}")
                    shown = time.monotonic()
        except BaseException:  # an interrupt: what was read stays read
            pool.shutdown(cancel_futures=True)
            for job, (one, now) in waiting.items():
                if not job.cancelled() and job.exception() is None:
                    state.add(one.path, now, job.result())
            state.save()
            raise
    end_progress()
    state.save(finished=True)
    found.problems.sort()
    return found


def _compare(one: Named, digest: str, found: Found) -> None:
    if digest != one.sha256:
        found.problems.append(
            _problem(one, f"differs: sha256 {digest[:12]}, and {one.sha256[:12]} in the record")
        )


def _problem(one: Named, what: str) -> str:
    return f"{shown(one.path)}: {what} (record {shown(one.by)})"


def _hash(path: Path) -> str:
    return directory_sha256(path) if path.is_dir() else sha256(path)


def _state(path: Path) -> tuple[int, int] | None:
    """Size and time (in nanoseconds) of a file; None where there is none.

    A directory has the size of all its files together, and the time of the newest.
    """
    try:
        told = path.stat()
        if not stat.S_ISDIR(told.st_mode):
            return told.st_size, told.st_mtime_ns
        states = [entry.stat() for entry in os.scandir(path) if entry.is_file()]
    except OSError:
        return None
    return sum(s.st_size for s in states), max((s.st_mtime_ns for s in states), default=0)
