"""Rows of raw files: every row of a file, or an error that names the place. Nothing is skipped in silence.

A row that cannot be used is an error, or is dropped and counted, as the settings say. A file that is damaged
or ends early is always an error: how many rows are missing is not known then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

from snaketron.data.drops import ARROW, FILTERED, MAX_DETAIL, Bad, Drops, missing, place, reject
from snaketron.data.json_rows import json_rows
from snaketron.log import UserError
from snaketron.settings.text import ReadSettings
from snaketron.sources.formats import READABLE, suffix_of


def read_texts(
    path: Path, text_field: str, settings: ReadSettings | None = None, drops: Drops | None = None
) -> Iterator[tuple[int, str]]:
    """The number (from 1) and the text of each row of a file that the settings let pass."""
    for number, text, _ in read_documents(path, text_field, settings=settings, drops=drops):
        yield number, text


def read_documents(
    path: Path,
    text_field: str,
    *,
    optional: Sequence[str] = (),
    settings: ReadSettings | None = None,
    drops: Drops | None = None,
) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """The number (from 1), the text and the fields of each row, as `read_rows` gives them.

    A row whose text is something else than text is a bad row.
    """
    settings, drops = settings or ReadSettings(), Drops() if drops is None else drops
    rows = read_rows(path, required=(text_field,), optional=optional, settings=settings, drops=drops)
    for number, row in rows:
        text = row[text_field]
        if isinstance(text, str):
            yield number, text, row
        else:
            kind = "null" if text is None else type(text).__name__
            bad = Bad(f"field {text_field!r} is {kind}, not text", "correct or remove the row")
            reject(bad, path, number, settings, drops)


def read_rows(
    path: Path,
    *,
    required: Sequence[str],
    optional: Sequence[str] = (),
    settings: ReadSettings | None = None,
    drops: Drops | None = None,
    exact: bool = False,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number (from 1) and the fields of each row that the settings let pass.

    The file is JSON lines (also compressed), Parquet or Arrow, as its name ends. Each row has the `required`
    fields. A row of JSON also has all its other fields; in the other formats it has the `optional` fields
    that are in the file. `a.b` is the field b of the object a, where no field is called so. A line of only
    white space is not a row. Memory does not grow with the file.

    Integers of more than 64 bits keep their digits in the `optional` fields and in those of `where`, in the
    other fields of JSON if they are wanted `exact`.
    `drops` counts all rows, and by reason those that do not pass. The caller stops at
    `settings.max_documents`, and calls `drops.check` after the last file.
    """
    settings, drops = settings or ReadSettings(), Drops() if drops is None else drops
    suffix = suffix_of(path.name)
    if not suffix:
        raise UserError(f"{path}: unknown format; give {READABLE}")
    if suffix in ARROW:
        from snaketron.data.arrow_rows import arrow_rows  # pyarrow takes a while

        rows = arrow_rows(path, required, optional, settings, drops)
    else:
        rows = json_rows(path, required, optional, settings, drops, exact)
    if settings.where:
        rows = _filtered(rows, path, settings.where, drops)
    return rows


def _filtered(
    rows: Iterable[tuple[int, dict[str, Any]]],
    path: Path,
    where: dict[str, list[str | int | bool]],
    drops: Drops,
) -> Iterator[tuple[int, dict[str, Any]]]:
    wanted = {name: set(map(_comparable, values)) for name, values in where.items()}
    for number, row in rows:
        for name, values in wanted.items():
            if name not in row:
                raise UserError(missing(f"{place(path, number)}: `where`", name, row))
            found = row[name] if isinstance(row[name], list) else [row[name]]
            if not any(_comparable(v) in values for v in found if isinstance(v, _COMPARED)):
                drops.reasons[FILTERED] += 1
                drops.first_filtered = drops.first_filtered or f"{name} is {row[name]!r}"[:MAX_DETAIL]
                break
        else:
            yield number, row


_COMPARED = (str, int, float, Decimal, date)


def _comparable(value: str | int | float | Decimal | date) -> tuple[type, str | int | float | Decimal]:
    """A value that tells 1 from true.

    Columns of whole numbers with gaps are often written as 1.0, and data bases write them as decimals. A day
    is text in JSON and in the configuration.
    """
    if isinstance(value, date):
        return str, str(value)
    whole = isinstance(value, float | Decimal) and value % 1 == 0
    return (int, int(value)) if whole else (type(value), value)
