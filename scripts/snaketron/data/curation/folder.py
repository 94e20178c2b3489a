"""A stand-in for the folders that a datatrove block reads and writes.

A block lists folders, and names files by number; the workflow publishes each file under a name of its own.
So a block gets a folder that exists in memory only: it reads parts of the workflow's files and writes to
memory.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from snaketron.files import partial

import numpy as np
from datatrove.io import DataFolder

READ_BYTES = 256 << 20  # that all files of a block may hold in memory together


class Entered:
    """Something that a block enters, and that need not be closed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        pass


@dataclass
class Records(Entered):
    """A part of a file of fixed-size records, read a few at a time; the file is open only while it is read.

    `change` may replace the records of a chunk by others, or fewer.
    """

    file: Path
    dtype: np.dtype
    first: int  # number of the first record
    count: int
    change: Callable[[np.ndarray], np.ndarray] | None = None
    path: str = ""  # the name that the block knows
    at: int = 0

    @property
    def size(self) -> int:
        return self.count * self.dtype.itemsize

    def read(self, num_bytes: int) -> bytes:
        """The next whole records, as many as fit; b"" means the end."""
        while self.at < self.count:
            count = min(max(1, num_bytes // self.dtype.itemsize), self.count - self.at)
            offset = (self.first + self.at) * self.dtype.itemsize
            self.at += count
            chunk = np.fromfile(self.file, self.dtype, count, offset=offset)
            if len(chunk) < count:
                raise EOFError(f"{self.file}: shorter than its record says; delete it and run again")
            if self.change is not None:
                chunk = self.change(chunk)
            if len(chunk):
                return chunk.tobytes()
        return b""


class Folder(DataFolder):
    """Gives a block `files` under the names that it expects, in this order; `written` has what it writes."""

    cachable = False  # else fsspec gives the same folder to all who ask with equal arguments

    def __init__(self, files: Mapping[str, Records | bytes] | None = None) -> None:
        super().__init__("memory-of-this-job", auto_mkdir=False)
        self.files = dict(files or {})
        self.written: dict[str, bytearray] = defaultdict(bytearray)

    def list_files(
        self,
        subdirectory: str = "",
        recursive: bool = True,
        glob_pattern: str | None = None,
        include_directories: bool = False,
    ) -> list[str]:
        pattern = (glob_pattern or "*").removeprefix("**/")  # in a glob, `**/` may stand for nothing
        return [
            name for name in self.files if name.startswith(subdirectory) and fnmatch.fnmatch(name, pattern)
        ]

    def open(self, path: str, mode: str = "rb", *args: Any, **kwargs: Any) -> Any:
        entry = self.files[path]
        if isinstance(entry, bytes):
            return io.BytesIO(entry)
        entry.path = path
        return entry

    def open_files(self, paths: Any, mode: str = "rb", **kwargs: Any) -> list[Any]:
        return [self.open(path, mode) for path in paths]

    def is_local(self) -> bool:
        return False

    def get_output_file_manager(self, **kwargs: Any) -> Any:
        return _Written(self.written)


@dataclass
class _Written(Entered):
    files: dict[str, bytearray]

    def write(self, name: str, data: bytes) -> None:
        self.files[name] += data

    def close(self) -> None:
        pass


def chunk_records(dtype: np.dtype, num_files: int) -> int:
    """How many records to read from each of so many files at a time."""
    return int(np.clip(READ_BYTES // (dtype.itemsize * max(1, num_files)), 16, 4096))


@contextlib.contextmanager
def parts(path: Path) -> Iterator[Path]:
    """An empty directory beside `path` for what a block writes before it is one file.

    Only inside `files.writing(path)`, which keeps other processes out. What a killed job left is removed.
    """
    directory = partial(path).with_suffix(".parts")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def shard_name(path: Path) -> str:
    """CORPUS/SHARD of a file <anything>/CORPUS/SHARD.suffix."""
    return f"{path.parent.name}/{path.stem}"
