"""From an artifact to the record of the job that made it, and on to everything that it was made from.

Only this module knows where the record of an artifact lies.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from snaketron.files import sha256
from snaketron.lineage.record import Entry, Record, read
from snaketron.log import UserError

LARGEST_RECORD = 1 << 28  # bytes; a larger file of JSON is data


def places(path: Path) -> tuple[Path, ...]:
    """Where the record about a file may lie: record.json in its directory, or beside it under its name."""
    return path.parent / "record.json", path.with_suffix(".json"), path.with_name(f"{path.name}.json")


def record_of(entry: Entry) -> tuple[Path, Record] | None:
    """The path of the record about an input, and the record; None for a file that no rule made.

    The record must list the hash of the input. So a file that was made again since is not taken for the one
    that was used. An input may be a record itself.
    """
    path = entry.file
    if entry.version:  # a checkpoint
        return path / "record.json", read(path / "record.json")
    for candidate in places(path):
        try:
            if candidate == path and path.stat().st_size > LARGEST_RECORD:
                continue  # raw JSON, which may be larger than the memory
            record = read(candidate)
        except (UserError, FileNotFoundError):
            continue
        if candidate == path:
            if sha256(path) == entry.sha256:
                return path, record
        elif any(output.sha256 == entry.sha256 for output in record.outputs):
            return candidate, record
    return None


def record_about(path: Path) -> Record:
    """The record that lists the file or directory `path` as its output; `UserError` when there is none."""
    for candidate in places(path):
        if candidate != path and candidate.is_file():
            record = read(candidate)
            if any(output.path == str(path) for output in record.outputs):
                return record
    return read(path.with_suffix(".json"))  # says that it is not there, or is about a file that was moved


def known(path: Path) -> Path | Entry:
    """An input as the record about it lists it, so that it is not read again for its hash."""
    outputs = record_about(path).outputs
    return next((output for output in outputs if output.path == str(path)), path)


def ancestors(inputs: Iterable[Entry]) -> dict[Path, Record]:
    """The records of everything that `inputs` were made from; each comes after those of its own inputs.

    They may lead in a circle: a tokenizer that is taken from an export has the bytes of the one that the
    exported model was trained with, and the record about them is the newer one.
    """
    found: dict[Path, Record] = {}
    begun: set[Path] = set()

    def visit(inputs: Iterable[Entry]) -> None:
        for entry in inputs:
            made = record_of(entry)
            if made and made[0] not in begun:
                path, record = made
                begun.add(path)
                visit(record.inputs)
                found[path] = record

    visit(inputs)
    return found
