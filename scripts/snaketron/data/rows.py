"""Rows of raw files: every row of a file, or an error that names the place. Nothing is skipped in silence."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from snaketron.log import UserError

import orjson

_CHUNK = 1 << 14  # bytes of compressed input at a time
_BATCH = 128  # rows of Parquet at a time; documents can be megabytes
_REPLACE = "replace the file with a complete copy and run again"


def place(path: Path, number: int) -> str:
    """How errors name row `number` (from 1) of a file: FILE:LINE, or a row of Parquet."""
    return f"{path}: row {number}" if path.suffix == ".parquet" else f"{path}:{number}"


def read_texts(path: Path, field: str) -> Iterator[tuple[int, str]]:
    """The number (from 1) and the text of each row of a file."""
    for number, row in read_rows(path, required=(field,)):
        text = row[field]
        if not isinstance(text, str):
            kind = "null" if text is None else type(text).__name__
            raise UserError(
                f"{place(path, number)}: field {field!r} is {kind}, not text; correct or remove the row"
            )
        yield number, text


def read_rows(
    path: Path, *, required: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number (from 1) and the fields of each row of a .jsonl or .json (also .gz, .zst) or .parquet file.

    Each row has the `required` fields; JSON rows hold all others too, Parquet rows the `optional` ones that
    the file has. A line of only white space is not a row. Memory does not grow with the file.
    """
    if path.suffix == ".parquet":
        yield from _parquet_rows(path, required, optional)
    elif path.name.removesuffix(".gz").removesuffix(".zst").endswith((".jsonl", ".json")):
        yield from _json_rows(path, required)
    else:
        raise UserError(f"{path}: unknown format; give .jsonl or .json (also .gz or .zst), or .parquet")


def _json_rows(path: Path, required: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    with _open(path) as file:
        lines = iter(_decompressed(path, file))
        while True:
            try:
                line = next(lines)
            except StopIteration:
                return
            except (EOFError, OSError, zlib.error) as error:
                raise UserError(
                    f"{path}:{number + 1}: cut off or damaged here ({error}); {_REPLACE}"
                ) from None
            number += 1
            if not line.isspace():
                yield number, _parse(line, place(path, number), required)


def _parse(line: bytes, where: str, required: Sequence[str]) -> dict[str, Any]:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode()
        except UnicodeDecodeError as bad:
            at = f"byte 0x{line[bad.start]:02x} at position {bad.start + 1}"
            raise UserError(f"{where}: invalid UTF-8 ({at}); convert the file to UTF-8") from None
        raise UserError(
            f"{where}: invalid JSON ({error.msg}, column {error.colno}); each line must be a JSON object"
        ) from None
    if not isinstance(row, dict):
        raise UserError(
            f"{where}: a JSON {type(row).__name__}, not an object; each line must be a JSON object"
        )
    for field in required:
        if field not in row:
            raise UserError(_missing(where, field, row))
    return row


def _missing(where: str, field: str, present: Sequence[str] | dict[str, Any]) -> str:
    fields = ", ".join(repr(name) for name in present) or "none"
    return f"{where}: no field {field!r}; the fields are {fields}; name one of them in the configuration"


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _decompressed(path: Path, file: BinaryIO) -> io.BufferedReader | BinaryIO:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=file))  # type: ignore[arg-type]
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdFile(file))
    return file


class _ZstdFile(io.RawIOBase):
    """All frames of a zstd file. The library's own stream readers end without a word where a file is cut off,
    and after the first frame (pzstd and `cat a.zst b.zst` write several)."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self._file = file
        self._context = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # what `zstd --long=31` needs
        self._error = zstandard.ZstdError
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            data = self._input or self._file.read(_CHUNK)
            self._input = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("the file ends inside a zstd frame")
                return 0
            if self._frame is None:
                self._frame = self._context.decompressobj()
            try:
                self._output = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise OSError(str(error)) from None
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count


def _parquet_rows(
    path: Path, required: Sequence[str], optional: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    with _open(path) as raw:
        try:
            # buffer_size: pages are streamed, a column of a row group need not fit in memory
            file = pyarrow.parquet.ParquetFile(raw, buffer_size=1 << 20)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"{path}: not a complete Parquet file ({_first_line(error)}); {_REPLACE}"
            ) from None
        names = file.schema_arrow.names
        for field in required:
            if field not in names:
                raise UserError(_missing(str(path), field, names))
        columns = [*required, *(field for field in optional if field in names)]
        number = 0
        batches = file.iter_batches(batch_size=_BATCH, columns=columns)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (pyarrow.ArrowException, OSError) as error:
                reason = f"damaged after row {number} ({_first_line(error)})"
                raise UserError(f"{path}: {reason}; {_REPLACE}") from None
            for i in range(batch.num_rows):
                number += 1
                try:
                    yield number, batch.slice(i, 1).to_pylist()[0]
                except UnicodeDecodeError:
                    raise UserError(
                        f"{place(path, number)}: invalid UTF-8; convert the file to UTF-8"
                    ) from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
