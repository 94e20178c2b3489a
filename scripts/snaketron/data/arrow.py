"""Arrow arrays and Parquet footers, without pandas: pyarrow's own conversions would import it (1 s a job).

Every Parquet file that the package writes says in its footer, under `FOOTER`, what it is and what made it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from snaketron.lineage.record import FOOTER
from snaketron.log import UserError, first_line

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_TEXT = pa.string()


def list_array(arrays: Sequence[np.ndarray], value_type: pa.DataType) -> pa.ListArray:
    """An Arrow list column of numpy arrays."""
    offsets = np.cumsum([0, *(len(array) for array in arrays)], dtype=np.int32)
    values = np.concatenate([np.empty(0, dtype=value_type.to_pandas_dtype()), *arrays])
    return pa.ListArray.from_arrays(number_array(offsets, pa.int32()), number_array(values, value_type))


def string_array(values: Sequence[str | None], value_type: pa.DataType = _TEXT) -> pa.Array:
    """An Arrow array of text, null where a value is None."""
    encoded = [b"" if value is None else value.encode(errors="replace") for value in values]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int32 if value_type == _TEXT else np.int64)
    valid = np.packbits(np.array([value is not None for value in values], dtype=bool), bitorder="little")
    buffers = [pa.py_buffer(valid), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(value_type, len(encoded), buffers)


def text_of(value: Any) -> str | None:
    """A metadata value as text: a string, or bytes, as it is, nothing as null, all else as JSON."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        return _plain(value)
    return json.dumps(value, ensure_ascii=False, default=_plain)


def _plain(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def number_array(values: np.ndarray, value_type: pa.DataType) -> pa.Array:
    """An Arrow array of numbers, without a copy."""
    values = np.ascontiguousarray(values, dtype=value_type.to_pandas_dtype())
    return pa.Array.from_buffers(value_type, len(values), [None, pa.py_buffer(values)])


def schema_with(
    columns: Iterable[pa.Field | tuple[str, pa.DataType]],
    about: Mapping[str, Any],
    fields: Sequence[str] = (),
    what: str = "",
) -> pa.Schema:
    """Columns, and one of text for each metadata field; the footer says what the file is `about`.

    Raises `UserError` for a field that has the name of a column of `what`.
    """
    own = pa.schema(columns)
    if taken := [name for name in fields if name in own.names]:
        raise UserError(
            f"metadata_fields: {taken[0]!r} is a column of {what} itself; leave it out of metadata_fields, "
            "or rename it in the raw files"
        )
    texts = ((name, _TEXT) for name in fields)
    return pa.schema([*own, *texts], metadata={FOOTER: json.dumps(about).encode()})


def read_footer(path: Path, columns: Sequence[str]) -> tuple[pq.FileMetaData, dict[str, Any]]:
    """The Parquet footer of a file, and what it says under `FOOTER`.

    Raises `UserError` for a file that the package did not write, or that lacks one of `columns`.
    """
    with opening(path):
        footer = pq.read_metadata(path)
    missing = [name for name in columns if name not in footer.schema.to_arrow_schema().names]
    if missing:
        raise UserError(f"{path}: column {', '.join(missing)} is missing; this is another kind of file")
    written = (footer.metadata or {}).get(FOOTER)
    if written is None:
        raise UserError(f"{path}: the footer does not say what made it; let the workflow make the file")
    return footer, json.loads(written)


@contextlib.contextmanager
def opening(path: Path) -> Iterator[None]:
    """Say what is wrong with a file of Parquet that some rule has made, where it cannot be read."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; the rule that makes it has not finished") from None
    except (OSError, pa.ArrowException) as error:
        why = first_line(error)
        if isinstance(error, OSError) and error.errno:  # of the system; the file may be sound
            raise UserError(f"{path}: cannot be read ({why})") from None
        raise UserError(f"{path}: damaged or not Parquet ({why}); delete it and run again") from None


def row_groups(
    path: Path,
    columns: Sequence[str],
    numbers: Iterable[int] | None = None,
    footer: pq.FileMetaData | None = None,
) -> Iterator[pa.Table]:
    """Row groups of a file that some rule has made: all of them, or those of some numbers.

    `footer` is that of the file, where it has been read.
    """
    with opening(path), pq.ParquetFile(path, metadata=footer) as file:  # pq.read_table imports pandas: 1 s
        for number in range(file.num_row_groups) if numbers is None else numbers:
            yield file.read_row_group(number, columns=columns, use_threads=False)


def check_expected(path: Path, metadata: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise `UserError` unless the `metadata` of the file `path` has all `expected` values."""
    for name, value in expected.items():
        if metadata.get(name) != value:
            raise UserError(
                f"{path}: was made with {name} {metadata.get(name)}, and {value} is wanted; "
                "run the workflow again to render and pack the conversations anew"
            )


def flatten(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The values of a list column, and offsets: row i holds values[offsets[i] : offsets[i + 1]]."""
    lengths = [np.diff(view(chunk.offsets)) for chunk in column.chunks]
    values = [view(chunk.flatten()) for chunk in column.chunks]
    if len(values) == 1:
        joined = values[0]
    else:
        joined = np.concatenate([np.empty(0, dtype=column.type.value_type.to_pandas_dtype()), *values])
    return joined, np.cumsum(np.concatenate([np.zeros(1, dtype=np.int64), *lengths]), dtype=np.int64)


def view(array: pa.Array) -> np.ndarray:
    """A read-only view of an Arrow array of numbers without nulls (`to_numpy()` would import pandas)."""
    dtype = np.dtype(array.type.to_pandas_dtype())
    data = array.buffers()[1] or b""
    view = np.frombuffer(data, dtype=dtype, count=len(array), offset=array.offset * dtype.itemsize)
    view.flags.writeable = False  # else a batch that is changed in place would change the cache
    return view
