"""Rows of JSON lines, compressed or not."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from snaketron.data import doubled_keys
from snaketron.data.doubled_keys import DoubledKey
from snaketron.data.drops import (
    BUFFER,
    INVALID_TEXT,
    NAME_ONE,
    REPLACE,
    TOO_DEEP,
    Bad,
    Drops,
    no_field,
    open_raw,
    reject,
    too_large,
)
from snaketron.log import UserError
from snaketron.settings.text import ReadSettings
from snaketron.sources.formats import suffix_of

import orjson

_CHUNK = 1 << 14  # compressed bytes at a time: a few may become megabytes
_SURROGATE = re.compile("[\ud800-\udfff]")  # a str has no surrogate pairs, so each surrogate is invalid
_LONG_NUMBER = re.compile(rb"[:,\[\s](?:-[0-9]{19}|[0-9]{20})")  # it may need more than 64 bits
_MARK = b"\xef\xbb\xbf"  # the byte order mark that some programs put before UTF-8; it is no text
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # the mark of UTF-16 and UTF-32
_ABSENT = object()


def json_rows(
    path: Path,
    required: Sequence[str],
    optional: Sequence[str],
    settings: ReadSettings,
    drops: Drops,
    exact: bool,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file, as `snaketron.data.rows.read_rows` gives them, without `where`."""
    limit = settings.max_line_bytes
    beside = (*settings.where, *optional)
    dotted = [name for name in (*required, *beside) if "." in name]
    before = drops.num_rows
    for number, line, too_long in _lines(path, limit):
        drops.num_rows += 1
        try:
            if too_long:
                raise too_large("a line of", settings)
            row = _parse(line, settings, drops, exact, beside)
            for name in dotted:
                if (value := _nested(row, name)) is not _ABSENT:
                    row[name] = value
            for name in required:
                if name not in row:
                    raise Bad(no_field(name, row), NAME_ONE)
        except (Bad, RecursionError) as error:
            bad = error if isinstance(error, Bad) else TOO_DEEP
            if drops.num_rows == before + 1 and not too_long:  # the rest of a long line was not kept
                _check_kind(path, line)
            reject(bad, path, number, settings, drops)
        else:
            del line  # it may be large
            yield number, row


def _lines(path: Path, limit: int) -> Iterator[tuple[int, bytes, bool]]:
    """The number of each line that is not blank, its bytes, and whether they are more than `limit`."""
    number = 0
    with open_raw(path) as file:
        lines = _decompressed(path, file)
        while True:
            number += 1
            try:
                read = lines.readline(limit + len(_MARK) + 2)  # 2 bytes for the line end
                line = read.removeprefix(_MARK)
                too_long = len(line.rstrip(b"\r\n")) > limit if len(line) > limit else False
                if too_long:
                    rest = line
                    while rest and not rest.endswith(b"\n"):
                        rest = lines.readline(BUFFER)
            except (EOFError, OSError, zlib.error) as error:
                raise UserError(f"{path}:{number}: cut off or damaged here ({error}); {REPLACE}") from None
            if not read:
                return
            if line and not line.isspace():
                yield number, line, too_long


def _check_kind(path: Path, line: bytes) -> None:
    """`UserError` where the first row of a file shows that it is something else than JSON lines."""
    if line.startswith(_UTF_16) or b"\0" in line[:2]:  # `{` takes one byte of UTF-8
        raise UserError(f"{path}: is UTF-16 or UTF-32; convert it to UTF-8, for example with iconv")
    line = line.strip()
    if line.startswith((b"[", b"{")) and line.endswith((b"[", b"{", b",")):
        every = "'.[]'" if line.startswith(b"[") else "."
        raise UserError(
            f"{path}: is one JSON document over several lines, and each line must be a JSON object; write it "
            f"so, for example with `jq -c {every}`"
        )


def _parse(
    line: bytes, settings: ReadSettings, drops: Drops, exact: bool, beside: Sequence[str]
) -> dict[str, Any]:
    try:
        row = orjson.loads(line)
        if (exact and _LONG_NUMBER.search(line)) or any(_rounded(_nested(row, name)) for name in beside):
            row = doubled_keys.loads(line)  # orjson makes floating-point numbers of them
        elif isinstance(row, dict) and doubled_keys.may_be_doubled(line, row):
            doubled_keys.loads(line)
    except orjson.JSONDecodeError as error:
        row = _repaired(line, error, settings)
        drops.num_replaced += 1
    except DoubledKey as error:
        raise _doubled(error) from None
    if not isinstance(row, dict):
        fix = "each line must be a JSON object"
        if isinstance(row, list):
            fix += "; `jq -c '.[]'` makes a line of each item"
        raise Bad(f"a JSON {type(row).__name__}, not an object", fix)
    return row


def _nested(value: Any, name: str) -> Any:
    """The field `name` of an object, or for `a.b` the field b of its field a; `_ABSENT` for no field."""
    if not isinstance(value, dict):
        return _ABSENT
    if name in value:
        return value[name]
    for dot in (i for i, letter in enumerate(name) if letter == "."):
        if (found := _nested(value.get(name[:dot]), name[dot + 1 :])) is not _ABSENT:
            return found
    return _ABSENT


def _rounded(value: Any) -> bool:
    """Whether a value of orjson may hold an integer that has lost digits."""
    if isinstance(value, dict | list):
        return any(map(_rounded, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and abs(value) >= 1 << 63


class _NotJson(ValueError):
    """A number that Python reads and JSON does not have."""


def _repaired(line: bytes, error: orjson.JSONDecodeError, settings: ReadSettings) -> Any:
    """The value of a line that orjson refuses; `Bad` unless only its text is invalid and may be replaced."""
    try:
        text, problem, fix = line.decode(), "a lone surrogate", "correct the text"
    except UnicodeDecodeError as bad:
        text = line.decode(errors="replace")
        problem = f"invalid UTF-8 (byte 0x{line[bad.start]:02x} at position {bad.start + 1})"
        fix = "convert the file to UTF-8"
    try:
        value = doubled_keys.loads(text, parse_constant=_refuse)
    except DoubledKey as doubled:
        raise _doubled(doubled) from None
    except _NotJson as constant:
        column = error.colno - str(constant).startswith("-")
        detail = f"invalid JSON ({constant}, column {column}, is no JSON number)"
        raise Bad(detail, "write null or a number in its place") from None
    except (ValueError, RecursionError):
        value = None
    repaired = replaced(value)
    if problem == "a lone surrogate" and repaired == value:  # no surrogate was found: something else is wrong
        detail = f"invalid JSON ({error.msg}, column {error.colno})"
        raise Bad(detail, "each line must be a JSON object")
    if value is None:
        raise Bad(f"{problem} and invalid JSON", fix)
    if settings.invalid_text != "replace":
        raise Bad(problem, fix, INVALID_TEXT)
    return repaired


def _doubled(error: DoubledKey) -> Bad:
    return Bad(str(error), "remove one of them, because only one can be read")


def _refuse(constant: str) -> None:
    raise _NotJson(constant)


def replaced(value: Any) -> Any:
    """A value with U+FFFD for each lone surrogate."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [replaced(item) for item in value]
    if isinstance(value, dict):
        return {replaced(key): replaced(item) for key, item in value.items()}
    return value


# ------------------------------------------------------------------------------------------- compression


def _decompressed(path: Path, file: BinaryIO) -> io.BufferedReader | BinaryIO:
    match suffix_of(path.name).rpartition(".")[2]:
        case "gz":
            return io.BufferedReader(gzip.GzipFile(fileobj=file), BUFFER)  # type: ignore[arg-type]
        case "zst":
            import zstandard

            context = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # what `zstd --long=31` needs
            frames = _Frames(file, "zstd", context.decompressobj, zstandard.ZstdError)
        case "bz2":
            frames = _Frames(file, "bzip2", bz2.BZ2Decompressor, OSError)
        case "xz":
            frames = _Frames(file, "xz", lzma.LZMADecompressor, lzma.LZMAError)
        case _:
            return file
    return io.BufferedReader(frames, BUFFER)


class _Frames(io.RawIOBase):
    """All frames of a compressed file (parallel compressors and `cat a.zst b.zst` write several).

    The stream readers of zstandard end in silence after the first frame and where a file is cut off, those of
    Python's bz2 and lzma in silence before what is no frame.
    """

    def __init__(self, file: BinaryIO, kind: str, begin: Callable[[], Any], error: type[Exception]) -> None:
        self._file, self._kind, self._begin, self._error = file, kind, begin, error
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            data = b""
            if self._frame is None or getattr(self._frame, "needs_input", True):
                data = self._input or self._file.read(_CHUNK)
                self._input = b""
                if self._frame is None and self._kind == "xz":
                    while data and not (data := data.lstrip(b"\0")):  # padding
                        data = self._file.read(_CHUNK)
                if not data:
                    if self._frame is not None:
                        raise EOFError(f"the file ends inside a {self._kind} frame")
                    return 0
            if self._frame is None:
                self._frame = self._begin()
            try:
                # zstd takes no limit; the other two can make gigabytes of a chunk.
                limit = () if self._kind == "zstd" else (BUFFER,)
                self._output = memoryview(self._frame.decompress(data, *limit))
            except self._error as error:
                raise OSError(str(error)) from None
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count
