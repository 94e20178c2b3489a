"""Rows of Parquet and Arrow files."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from snaketron.data.drops import (
    BUFFER,
    INVALID_TEXT,
    REPLACE,
    Bad,
    Drops,
    missing,
    open_raw,
    reject,
    too_large,
)
from snaketron.log import UserError, first_line
from snaketron.settings.text import ReadSettings
from snaketron.sources.formats import suffix_of

import pyarrow as pa

_BATCH_BYTES = 4 << 20  # of Parquet to read at a time, by the average size of its rows
_BATCH_ROWS = 1024
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def arrow_rows(
    path: Path, required: Sequence[str], optional: Sequence[str], settings: ReadSettings, drops: Drops
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file, as `snaketron.data.rows.read_rows` gives them, without `where`."""
    with open_raw(path) as raw:
        kind = "Parquet" if suffix_of(path.name) == ".parquet" else "Arrow"
        try:
            schema, batches = _parquet(raw) if kind == "Parquet" else _ipc(raw)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{path}: not a complete {kind} file ({first_line(error)}); {REPLACE}") from None
        wanted = (*required, *settings.where)
        places = _places(path, schema, wanted, optional)
        number = 0
        iterator = batches(list(places.values()))
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except (pa.ArrowException, OSError) as error:
                reason = f"damaged after row {number} ({first_line(error)})"
                raise UserError(f"{path}: {reason}; {REPLACE}") from None
            for row in _rows_of(batch, places, wanted):
                number += 1
                drops.num_rows += 1
                try:
                    _check(row, settings, drops)
                except Bad as bad:
                    reject(bad, path, number, settings, drops)
                else:
                    yield number, row


# ------------------------------------------------------------------------------------------------ columns

type Place = tuple[str, ...]  # a column, and for a field of a struct the names below it
type Batches = Callable[[Sequence[Place]], Iterator[pa.RecordBatch]]


def _places(
    path: Path, schema: pa.Schema, required: Sequence[str], optional: Sequence[str]
) -> dict[str, Place]:
    """Where each wanted field is: `required`, or `UserError`, and what is there of `optional`."""
    found: dict[str, Place] = {}
    for name in dict.fromkeys((*required, *optional)):
        if place := _place(list(schema), name):
            found[name] = place
            fields = list(schema)
            for depth, part in enumerate(place, 1):
                of_name = [field for field in fields if field.name == part]
                if len(of_name) > 1:
                    several = ".".join(place[:depth])
                    raise UserError(f"{path}: several columns are called {several!r}; leave one of them")
                fields = of_name[0].type.fields if depth < len(place) else []
        elif name in required:
            raise UserError(missing(str(path), name, schema.names))
    return found


def _place(fields: Sequence[pa.Field], name: str) -> Place:
    """Where a field is; () for no field. `a.b` is field b of the struct a, where no field is called so."""
    if any(field.name == name for field in fields):
        return (name,)
    for field in fields:
        inside = name.startswith(f"{field.name}.") and pa.types.is_struct(field.type)
        if inside and (below := _place(field.type.fields, name[len(field.name) + 1 :])):
            return (field.name, *below)
    return ()


@dataclass
class _Undecoded:
    """A value in which text is not valid UTF-8."""

    replaced: Any


def _rows_of(
    batch: pa.RecordBatch, places: Mapping[str, Place], required: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The rows of a batch; a column at a time is ten times as fast as a row at a time."""
    lists = []
    for name, place in places.items():
        column = batch.column(batch.schema.get_field_index(place[0]))
        if below := place[1:]:
            import pyarrow.compute as pc

            column = pc.struct_field(column, list(below))
        if name in required:
            column = _as_text(column)
        try:
            lists.append(column.to_pylist())
        except UnicodeDecodeError:
            lists.append([_decoded(column.slice(i, 1)) for i in range(len(column))])
    for values in zip(*lists, strict=True):
        yield dict(zip(places, values, strict=True))


def _as_text(column: pa.Array) -> pa.Array:
    """A column with text in the place of bytes, which many programs write for text; it may be invalid."""
    if pa.types.is_dictionary(column.type) and _holds_bytes(column.type.value_type):
        column = column.dictionary_decode()
    return column.view(_changed(column.type, to_text=True)) if _holds_bytes(column.type) else column


def _holds_bytes(kind: pa.DataType) -> bool:
    return _changed(kind, to_text=True) != kind


def _decoded(one: pa.Array) -> Any:
    """The value of an array of one; `_Undecoded` where its text is not valid UTF-8."""
    try:
        return one.to_pylist()[0]
    except UnicodeDecodeError:
        return _Undecoded(_replaced(one.cast(_changed(one.type, to_text=False)).to_pylist()[0]))


def _changed(kind: pa.DataType, *, to_text: bool) -> pa.DataType:
    """The Arrow type `kind` with text in the place of bytes, or with bytes in the place of text."""
    if pa.types.is_struct(kind):
        return pa.struct([f.with_type(_changed(f.type, to_text=to_text)) for f in kind.fields])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        new = pa.list_ if to_text and pa.types.is_list(kind) else pa.large_list
        return new(kind.value_field.with_type(_changed(kind.value_type, to_text=to_text)))
    if to_text:
        short, long = pa.types.is_binary(kind), pa.types.is_large_binary(kind)
        return pa.string() if short else pa.large_string() if long else kind
    if pa.types.is_dictionary(kind):
        return _changed(kind.value_type, to_text=False)
    return pa.large_binary() if pa.types.is_string(kind) or pa.types.is_large_string(kind) else kind


def _replaced(value: Any) -> Any:
    """A value with text in the place of bytes, and U+FFFD for what is not UTF-8."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, list):
        return [_replaced(item) for item in value]
    if isinstance(value, dict):
        return {key: _replaced(item) for key, item in value.items()}
    return value


def _check(row: dict[str, Any], settings: ReadSettings, drops: Drops) -> None:
    """Apply the settings to a row of Parquet or Arrow; they may replace invalid text in it."""
    invalid = False
    limit = settings.max_line_bytes
    for name, value in row.items():
        if isinstance(value, str):
            if 4 * len(value) > limit and len(value.encode()) > limit:  # a character has at most 4 bytes
                raise too_large(f"field {name!r} has", settings)
        elif isinstance(value, _Undecoded):
            if settings.invalid_text != "replace":
                raise Bad(f"invalid UTF-8 in field {name!r}", "convert the file to UTF-8", INVALID_TEXT)
            row[name] = value.replaced
            invalid = True
    drops.num_replaced += invalid


def _parquet(raw: BinaryIO) -> tuple[pa.Schema, Batches]:
    """The schema of a Parquet file, and a function that reads batches of some columns."""
    from pyarrow.parquet import ParquetFile

    # With a buffer_size, pages are streamed: a row group's column need not fit in memory.
    file = ParquetFile(raw, buffer_size=BUFFER, page_checksum_verification=True)
    num_bytes = [1]  # average size of a row, for each row group
    for group in map(file.metadata.row_group, range(file.num_row_groups)):
        num_bytes.append(group.total_byte_size // max(1, group.num_rows))
    num_rows = min(_BATCH_ROWS, max(1, _BATCH_BYTES // max(num_bytes)))
    return file.schema_arrow, lambda places: file.iter_batches(
        num_rows, columns=[".".join(p) for p in places]
    )


def _ipc(raw: BinaryIO) -> tuple[pa.Schema, Batches]:
    """The schema of an Arrow file or stream, and a function that reads batches of some columns."""
    is_file = raw.read(6) == b"ARROW1"
    if not is_file:
        # Without this mark, a stream that is cut off between two batches would look complete.
        raw.seek(max(0, raw.seek(0, io.SEEK_END) - len(_END_OF_STREAM)))
        if raw.read() != _END_OF_STREAM:
            raise ValueError("no end-of-stream mark")
    raw.seek(0)
    reader = pa.ipc.open_file if is_file else pa.ipc.open_stream
    with reader(raw) as opened:
        schema = opened.schema

    def batches(places: Sequence[Place]) -> Iterator[pa.RecordBatch]:
        raw.seek(0)
        options = pa.ipc.IpcReadOptions(
            included_fields=sorted({schema.get_field_index(place[0]) for place in places})
        )
        with reader(raw, options=options) as opened:
            whole = map(opened.get_batch, range(opened.num_record_batches)) if is_file else opened
            for batch in whole:
                for start in range(0, batch.num_rows, _BATCH_ROWS):
                    yield batch.slice(start, _BATCH_ROWS)

    return schema, batches
