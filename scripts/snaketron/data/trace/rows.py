"""The rows of a raw file: those that hold a text, and where a file of the workflow has them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from snaketron.data.arrow import view
from snaketron.data.rows import read_rows
from snaketron.lineage.uses import Source
from snaketron.log import UserError
from snaketron.settings.text import ReadSettings
from snaketron.wording import plural

import numpy as np
import pyarrow.parquet as pq

MOST = 100  # rows; a text that more have is not that of a document
FIELDS = ("text_field", "messages_field")  # keys of settings that say which field of a row is read


def written(path: Path, file: str, rows: Iterable[int], *columns: str) -> list[tuple[Any, ...]]:
    """What a Parquet file has of some rows of the raw `file`: its own number, the raw row, `columns`.

    Raises `UserError` where it is gone.
    """
    wanted, found, before = list(rows), list[tuple[Any, ...]](), 0
    if not path.exists():
        raise UserError(
            f"{path}: not here any more, so the rows of {file} cannot be found; run the workflow to make it "
            "again"
        )
    with pq.ParquetFile(path) as opened:
        for batch in opened.iter_batches(columns=["file", "row", *columns]):
            numbers = view(batch.column("row"))
            for i in np.flatnonzero(np.isin(numbers, wanted)).tolist():
                if batch.column("file")[i].as_py() == file:
                    more = (batch.column(name)[i].as_py() for name in columns)
                    found.append((before + i, int(numbers[i]), *more))
            before += batch.num_rows
    return found


def origins(path: Path, rows: Sequence[int]) -> dict[str, list[int]]:
    """The raw files, and their rows, of some rows (from 1) of a file that curation wrote."""
    try:
        table = pq.read_table(path, columns=["file", "row"], partitioning=None)
    except FileNotFoundError:
        raise UserError(
            f"{path}: is not here any more, and it alone says which raw rows its rows are; ask about those"
        ) from None
    if max(rows) > table.num_rows:
        raise UserError(f"{path}: has {plural(table.num_rows, 'row')}, and no row {max(rows):,}")
    found: dict[str, list[int]] = {}
    for value in table.take([row - 1 for row in rows]).to_pylist():
        found.setdefault(value["file"], []).append(value["row"])
    return found


def rows_with(source: Source, text: str) -> list[int]:
    """The numbers (from 1) of the rows in which `text` is a part of a string.

    Raises `UserError` where the file is not here, where no row has it, or more than `MOST` have.
    """
    made, entry = next(
        ((m, e) for m, e in source.read if any(f in m.record.settings for f in FIELDS)), (None, None)
    )
    if made is None or entry is None:
        raise UserError(f"{source.name}: no job read it as text or as conversations")
    path = made.place(entry)
    if not path.exists():
        raise UserError(f"{path}: is not here any more, so it cannot be searched; give the number of the row")
    found = []
    for number, row in _rows(path, made.record.settings):
        if any(text in string for string in _strings(row)):
            found.append(number)
            if len(found) > MOST:
                raise UserError(f"{path}: more than {MOST} rows have this text; give more of it")
    if not found:
        raise UserError(f"{path}: no row has this text")
    return found


def _rows(path: Path, settings: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    field = next(settings[name] for name in FIELDS if name in settings)
    most = settings.get("max_line_bytes", ReadSettings().max_line_bytes)
    reading = ReadSettings(bad_rows="drop", invalid_text="replace", max_line_bytes=most)
    return read_rows(path, required=[field], settings=reading)


def _strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
