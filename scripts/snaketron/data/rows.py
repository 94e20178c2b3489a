"""Rows of raw files: every row of a file, or an error that names the place. Nothing is skipped in silence.

A row that cannot be used is an error, or is dropped and counted, as the settings say. A file that is damaged
or ends early is always an error: how many rows are missing is not known then.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from snaketron.log import UserError
from snaketron.settings.text import ReadSettings

import orjson

if TYPE_CHECKING:
    import pyarrow as pa

BAD_ROW = "bad row"
INVALID_TEXT = "invalid text"
FILTERED = "filtered by where"
MAX_LISTED = 100  # dropped rows that a record names, for each reason
MAX_DETAIL = 200  # characters
MAX_EXAMPLES = 5  # dropped rows in an error

_CHUNK = 1 << 14  # bytes of zstd at a time: a few may become megabytes
_BUFFER = 1 << 20  # bytes
_BATCH_BYTES = 4 << 20  # of Parquet to read at a time, by the average size of its rows
_BATCH_ROWS = 1024
_REPLACE = "replace the file with a complete copy and run again"
_SURROGATE = re.compile("[\ud800-\udfff]")  # a str has no surrogate pairs, so each surrogate is invalid
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


@dataclass
class Drops:
    """Rows that are not used: how many for each reason, and which."""

    reasons: Counter[str] = field(default_factory=Counter)
    listed: list[dict[str, Any]] = field(default_factory=list)
    num_rows: int = 0  # rows that were read, used or not
    num_replaced: int = 0  # rows in whose text U+FFFD replaced invalid characters
    advice: Mapping[str, str] = field(default_factory=dict)  # what to do, by reason

    def add(self, path: Path | str, row: int, reason: str, detail: str = "") -> None:
        """Count row `row` of the file `path`."""
        self.reasons[reason] += 1
        if self.reasons[reason] <= MAX_LISTED:
            entry = {"file": str(path), "row": row, "reason": reason, "detail": detail[:MAX_DETAIL]}
            self.listed.append(entry)

    def check(self, settings: ReadSettings, reasons: Iterable[str] = (BAD_ROW, INVALID_TEXT)) -> None:
        """Raise `UserError` when more rows were dropped for `reasons` than the settings allow; it shows an
        example of each reason. Call this after the last file."""
        counted = {reason: self.reasons[reason] for reason in reasons if self.reasons[reason]}
        dropped = sum(counted.values())
        if not dropped or dropped <= settings.max_dropped_fraction * self.num_rows:
            return
        first = {row["reason"]: row for row in reversed(self.listed) if row["reason"] in counted}
        examples = sorted(first.values(), key=self.listed.index)[:MAX_EXAMPLES]
        others = "".join(f"; another: {self._explain(row)}" for row in examples[1:])
        raise UserError(
            f"{dropped} of {self.num_rows} rows are bad or invalid, more than max_dropped_fraction "
            f"{settings.max_dropped_fraction} allows; the first is {self._explain(examples[0])}{others}; "
            "correct the files, or raise max_dropped_fraction"
        )

    def _explain(self, row: Mapping[str, Any]) -> str:
        """A dropped row in a line: where, why and what to do."""
        reason, where = row["reason"], place(Path(row["file"]), row["row"])
        named = "" if reason in (BAD_ROW, INVALID_TEXT) else reason  # the detail names the problem
        advice = f"({self.advice[reason]})" if reason in self.advice else ""
        why = ": ".join(part for part in (named, row["detail"]) if part)
        return f"{where}: {why} {advice}".rstrip()


@dataclass
class Bad(Exception):
    """Why a row cannot be used."""

    detail: str
    fix: str
    reason: str = BAD_ROW


def place(path: Path, number: int) -> str:
    """How errors name row `number` (from 1) of a file: FILE:LINE, or a row of Parquet or Arrow."""
    return f"{path}: row {number}" if path.suffix in (".parquet", ".arrow") else f"{path}:{number}"


def read_texts(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
    """The number (from 1) and the text of each row of a file."""
    for number, text, _ in read_documents(path, text_field):
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
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number (from 1) and the fields of each row that the settings let pass.

    The file is .jsonl or .json (also .gz, .zst), .parquet or .arrow. Each row has the `required` fields.
    A row of JSON also has all its other fields; in the other formats it has the `optional` fields that are in
    the file. A line of only white space is not a row. Memory does not grow with the file.

    `drops` counts all rows, and by reason those that do not pass. The caller stops at
    `settings.max_documents`, and calls `drops.check` after the last file.
    """
    settings, drops = settings or ReadSettings(), Drops() if drops is None else drops
    if path.suffix in (".parquet", ".arrow"):
        rows = _arrow_rows(path, required, optional, settings, drops)
    elif path.name.removesuffix(".gz").removesuffix(".zst").endswith((".jsonl", ".json")):
        rows = _json_rows(path, required, settings, drops)
    else:
        raise UserError(
            f"{path}: unknown format; give .jsonl or .json (also .gz or .zst), .parquet or .arrow"
        )
    if settings.where:
        rows = _filtered(rows, path, settings.where, drops)
    return rows


def reject(bad: Bad, path: Path, number: int, settings: ReadSettings, drops: Drops) -> None:
    """Stop at a row, or drop and count it, as the settings say."""
    policy = settings.invalid_text if bad.reason == INVALID_TEXT else settings.bad_rows
    if policy != "drop":
        raise UserError(f"{place(path, number)}: {bad.detail}; {bad.fix}") from None
    drops.add(path, number, bad.reason, bad.detail)


def _filtered(
    rows: Iterable[tuple[int, dict[str, Any]]],
    path: Path,
    where: dict[str, list[str | int | bool]],
    drops: Drops,
) -> Iterator[tuple[int, dict[str, Any]]]:
    wanted = {name: {(type(value), value) for value in values} for name, values in where.items()}
    for number, row in rows:
        for name, values in wanted.items():
            if name not in row:
                raise UserError(_missing(f"{place(path, number)}: `where`", name, row))
            found = row[name] if isinstance(row[name], list) else [row[name]]
            if not any((type(v), v) in values for v in found if isinstance(v, str | int)):
                drops.reasons[FILTERED] += 1
                break
        else:
            yield number, row


def _missing(where: str, name: str, present: Iterable[str]) -> str:
    return f"{where}: {_no_field(name, present)}; name one of them in the configuration"


def _no_field(name: str, present: Iterable[str]) -> str:
    return f"no field {name!r}; the fields are {', '.join(map(repr, present)) or 'none'}"


# ----------------------------------------------------------------------------------------------- JSON lines


def _json_rows(
    path: Path, required: Sequence[str], settings: ReadSettings, drops: Drops
) -> Iterator[tuple[int, dict[str, Any]]]:
    limit = settings.max_line_bytes
    number = 0
    with _open(path) as file:
        lines = _decompressed(path, file)
        while True:
            number += 1
            try:
                line = lines.readline(limit + 2)  # 2 bytes for the line end
                too_long = len(line.rstrip(b"\r\n")) > limit if len(line) > limit else False
                if too_long:
                    rest = line
                    while rest and not rest.endswith(b"\n"):
                        rest = lines.readline(_BUFFER)
            except (EOFError, OSError, zlib.error) as error:
                raise UserError(f"{path}:{number}: cut off or damaged here ({error}); {_REPLACE}") from None
            if not line:
                return
            if line.isspace():
                continue
            drops.num_rows += 1
            try:
                if too_long:
                    raise Bad(f"a line of more than {limit} bytes", "correct it, or raise max_line_bytes")
                row = _parse(line, settings, drops)
                for name in required:
                    if name not in row:
                        raise Bad(_no_field(name, row), "name one of them in the configuration")
            except Bad as bad:
                reject(bad, path, number, settings, drops)
            else:
                del line  # it may be large
                yield number, row


def _parse(line: bytes, settings: ReadSettings, drops: Drops) -> dict[str, Any]:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        row = _repaired(line, error, settings)
        drops.num_replaced += 1
    if not isinstance(row, dict):
        raise Bad(f"a JSON {type(row).__name__}, not an object", "each line must be a JSON object")
    return row


def _repaired(line: bytes, error: orjson.JSONDecodeError, settings: ReadSettings) -> Any:
    """The value of a line that orjson refuses; `Bad` unless only its text is invalid and may be replaced."""
    try:
        text, problem, fix = line.decode(), "a lone surrogate", "correct the text"
    except UnicodeDecodeError as bad:
        text = line.decode(errors="replace")
        problem = f"invalid UTF-8 (byte 0x{line[bad.start]:02x} at position {bad.start + 1})"
        fix = "convert the file to UTF-8"
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        value = None
    repaired = _replaced(value)
    if problem == "a lone surrogate" and repaired == value:  # no surrogate was found: something else is wrong
        detail = f"invalid JSON ({error.msg}, column {error.colno})"
        raise Bad(detail, "each line must be a JSON object")
    if value is None:
        raise Bad(f"{problem} and invalid JSON", fix)
    if settings.invalid_text != "replace":
        raise Bad(problem, f"{fix}, or set invalid_text to replace or drop", INVALID_TEXT)
    return repaired


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _replaced(value: Any) -> Any:
    """A value with U+FFFD for each lone surrogate and for invalid UTF-8."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, list):
        return [_replaced(item) for item in value]
    if isinstance(value, dict):
        return {_replaced(key): _replaced(item) for key, item in value.items()}
    return value


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb", buffering=_BUFFER)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _decompressed(path: Path, file: BinaryIO) -> io.BufferedReader | BinaryIO:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=file), _BUFFER)  # type: ignore[arg-type]
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdFile(file), _BUFFER)
    return file


class _ZstdFile(io.RawIOBase):
    """All frames of a zstd file (pzstd and `cat a.zst b.zst` write several).

    zstandard's own stream readers end in silence after the first frame, and where a file is cut off.
    """

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


# ---------------------------------------------------------------------------------------- Parquet and Arrow


def _arrow_rows(
    path: Path, required: Sequence[str], optional: Sequence[str], settings: ReadSettings, drops: Drops
) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow as pa

    with _open(path) as raw:
        kind = "Parquet" if path.suffix == ".parquet" else "Arrow"
        try:
            names, batches = _parquet(raw) if kind == "Parquet" else _ipc(raw)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(
                f"{path}: not a complete {kind} file ({_first_line(error)}); {_REPLACE}"
            ) from None
        for name in (*required, *settings.where):
            if name not in names:
                raise UserError(_missing(str(path), name, names))
        wanted = [*required, *settings.where, *(name for name in optional if name in names)]
        columns = list(dict.fromkeys(wanted))
        number = 0
        iterator = batches(columns)
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except (pa.ArrowException, OSError) as error:
                reason = f"damaged after row {number} ({_first_line(error)})"
                raise UserError(f"{path}: {reason}; {_REPLACE}") from None
            for row in _rows_of(batch, columns):
                number += 1
                drops.num_rows += 1
                try:
                    _check_arrow(row, settings, drops)
                except Bad as bad:
                    reject(bad, path, number, settings, drops)
                else:
                    yield number, row


@dataclass
class _Undecoded:
    """A value in which text is not valid UTF-8."""

    replaced: Any


def _rows_of(batch: pa.RecordBatch, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a batch; a column at a time is ten times as fast as a row at a time."""
    lists = []
    for name in columns:
        column = batch.column(batch.schema.get_field_index(name))
        try:
            lists.append(column.to_pylist())
        except UnicodeDecodeError:
            lists.append([_decoded(column.slice(i, 1)) for i in range(len(column))])
    for values in zip(*lists, strict=True):
        yield dict(zip(columns, values, strict=True))


def _decoded(one: pa.Array) -> Any:
    """The value of an array of one; `_Undecoded` where its text is not valid UTF-8."""
    try:
        return one.to_pylist()[0]
    except UnicodeDecodeError:
        return _Undecoded(_replaced(one.cast(_as_binary(one.type)).to_pylist()[0]))


def _as_binary(kind: pa.DataType) -> pa.DataType:
    """The Arrow type `kind`, with bytes in the place of text."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _as_binary(kind.value_type)
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_as_binary(field.type)) for field in kind.fields])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_as_binary(kind.value_type)))
    return pa.large_binary() if pa.types.is_string(kind) or pa.types.is_large_string(kind) else kind


def _check_arrow(row: dict[str, Any], settings: ReadSettings, drops: Drops) -> None:
    """Apply the settings to a row of Parquet or Arrow; they may replace invalid text in it."""
    invalid = False
    limit = settings.max_line_bytes
    for name, value in row.items():
        if isinstance(value, str):
            if 4 * len(value) > limit and len(value.encode()) > limit:  # a character has at most 4 bytes
                raise Bad(
                    f"field {name!r} has more than {limit} bytes", "correct it, or raise max_line_bytes"
                )
        elif isinstance(value, _Undecoded):
            if settings.invalid_text != "replace":
                raise Bad(
                    f"invalid UTF-8 in field {name!r}",
                    "convert the file to UTF-8, or set invalid_text to replace or drop",
                    INVALID_TEXT,
                )
            row[name] = value.replaced
            invalid = True
    drops.num_replaced += invalid


def _parquet(raw: BinaryIO) -> tuple[list[str], Callable[[list[str]], Iterator[pa.RecordBatch]]]:
    """The columns of a Parquet file, and a function that reads batches of some of them."""
    from pyarrow.parquet import ParquetFile

    # With a buffer_size, pages are streamed: a row group's column need not fit in memory.
    file = ParquetFile(raw, buffer_size=_BUFFER, page_checksum_verification=True)
    num_bytes = [1]  # average size of a row, for each row group
    for group in map(file.metadata.row_group, range(file.num_row_groups)):
        num_bytes.append(group.total_byte_size // max(1, group.num_rows))
    num_rows = min(_BATCH_ROWS, max(1, _BATCH_BYTES // max(num_bytes)))
    return file.schema_arrow.names, lambda names: file.iter_batches(num_rows, columns=names)


def _ipc(raw: BinaryIO) -> tuple[list[str], Callable[[list[str]], Iterator[pa.RecordBatch]]]:
    """The columns of an Arrow file or stream, and a function that reads batches of some of them."""
    import pyarrow as pa

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

    def batches(names: list[str]) -> Iterator[pa.RecordBatch]:
        raw.seek(0)
        options = pa.ipc.IpcReadOptions(included_fields=[schema.get_field_index(name) for name in names])
        with reader(raw, options=options) as opened:
            whole = map(opened.get_batch, range(opened.num_record_batches)) if is_file else opened
            for batch in whole:
                for start in range(0, batch.num_rows, _BATCH_ROWS):
                    yield batch.slice(start, _BATCH_ROWS)

    return schema.names, batches


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
