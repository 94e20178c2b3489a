"""From an artifact to the record of the job that made it, and on to everything that it was made from.

Only this module knows where the record of an artifact lies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path

from snaketron.files import sha256
from snaketron.lineage.placed import Placed, plain
from snaketron.lineage.record import BEGINNING, Entry, Record, begins, directory_name, parse, read
from snaketron.log import UserError

LARGEST_RECORD = 1 << 28  # bytes; a larger file of JSON is data


def places(path: Path) -> tuple[Path, ...]:
    """Where the record about a file may lie: record.json in its directory, or beside it under its name."""
    return path.parent / "record.json", path.with_suffix(".json"), path.with_name(f"{path.name}.json")


def damage(path: Path) -> str:
    """What is wrong with a damaged record about a file or directory, or at its place; empty without one."""
    for candidate in (path / "record.json", *places(path)):
        try:
            with candidate.open("rb") as file:
                if begins(beginning := file.read(len(BEGINNING))):
                    parse(candidate, beginning + file.read())
        except UserError as error:
            return f"its record is damaged: {error}"
        except OSError:
            continue
    return ""


def record_of(entry: Entry) -> tuple[Path, Record] | None:
    """The path of the record about an input, and the record; None for a file that no rule made.

    The record must list the hash of the input, or be of its version. So what was made again since is not
    taken for what was used. An input may be a record itself. There is none either of a checkpoint that was
    removed (`why_lost`).
    """
    path = entry.file
    if entry.version:
        return _record_of_version(entry)
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


def _record_of_version(entry: Entry) -> tuple[Path, Record] | None:
    """The record of a checkpoint; None also where it is damaged (`why_lost`)."""
    for directory in _directories(entry):
        path = directory / "record.json"
        with contextlib.suppress(UserError, OSError):
            if (record := read(path)).version == entry.version:
                return path, record
    return None


def _directories(entry: Entry) -> tuple[Path, Path]:
    """Where a checkpoint may be: at its path, or beside the directory that the path is a link to.

    A stage that was trained again has its link moved to the new version; the old one lies beside that.
    """
    return entry.file, entry.file.resolve().with_name(directory_name(entry.version))


def lost(records: Collection[Record]) -> list[Entry]:
    """The checkpoints that some jobs used and whose records are not among theirs; each version once."""
    inputs = {entry.version: entry for record in records for entry in record.inputs if entry.version}
    there = {record.version for record in records}
    return [entry for version, entry in inputs.items() if version not in there]


def why_lost(entry: Entry) -> str:
    """What became of a checkpoint whose record is not to be found."""
    for directory in _directories(entry):
        if wrong := damage(directory):
            return wrong
    try:
        now = read(entry.file / "record.json")
    except (UserError, OSError):
        return f"no record of {entry.version} is there any more"
    return f"replaced since by {now.version or now.name}, and the record of {entry.version} is gone"


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


def ancestors(inputs: Iterable[Entry], *, of_others: bool = True) -> dict[Path, Record]:
    """The records of everything that `inputs` were made from; each comes after those of its own inputs.

    In a record of another directory, the inputs have the paths that lead to them from here. Records may lead
    in a circle: a tokenizer that is taken from an export has the bytes of the one that the exported model was
    trained with, and the record about them is the newer one.

    Args:
        of_others: whether to go on behind a model of another directory; else its record has no inputs.
    """
    found: dict[Path, Record] = {}
    begun: set[Path] = set()

    def visit(inputs: Iterable[Entry]) -> None:
        for entry in inputs:
            made = record_of(entry)
            if made and (place := made[0].resolve()) not in begun:
                path, record = made[0], _from_here(*made, of_others=of_others)
                begun.add(place)
                visit(record.inputs)
                found[path] = record

    visit(inputs)
    return found


def _from_here(path: Path, record: Record, *, of_others: bool) -> Record:
    """A record whose inputs have the paths that lead to them from here."""
    made = Placed(plain(path), record)
    if made.is_of_here:
        return record
    is_end = not of_others and record.kind in ("checkpoint", "export")
    return replace(record, inputs=() if is_end else tuple(map(made.placed, record.inputs)))
