"""Megatron's indexed dataset (.bin and .idx): written as a stream, and checked, without torch.

`sources/pairs.py` explains the format.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from snaketron.log import UserError
from snaketron.sources.pairs import HEADER, MAGIC, differences, paths

import numpy as np

DTYPES: dict[int, np.dtype] = {4: np.dtype(np.int32), 8: np.dtype(np.uint16)}  # by Megatron's type codes
_BLOCK = 1 << 20  # sequences of an index at a time
_BUFFER = 1 << 20  # bytes


@dataclass(frozen=True)
class Pair:
    """What a complete .bin/.idx pair holds."""

    dtype: str
    sequences: int
    tokens: int


def check(prefix: Path, fix: str) -> Pair:
    """Check that both files exist and agree in every offset; a `UserError` names both numbers and `fix`."""
    for problem in differences(prefix, None):
        raise UserError(f"{problem}; {fix}")
    bin_path, idx_path = paths(prefix)
    with idx_path.open("rb") as file:
        _, _, code, sequences, bounds = HEADER.unpack(file.read(HEADER.size))
        lengths = np.fromfile(file, np.int32, sequences)
        offsets = np.fromfile(file, np.int64, sequences)
        documents = np.fromfile(file, np.int64, bounds)
    itemsize = DTYPES[code].itemsize
    ends = np.cumsum(lengths, dtype=np.int64) * itemsize
    total = int(ends[-1]) if sequences else 0
    if total != (bin_bytes := bin_path.stat().st_size):
        raise UserError(f"{bin_path}: {bin_bytes} bytes, where {idx_path.name} promises {total}; {fix}")
    if sequences and (lengths.min() < 1 or offsets[0] != 0 or not np.array_equal(offsets[1:], ends[:-1])):
        raise UserError(f"{idx_path}: its offsets do not follow from its {sequences} lengths; {fix}")
    if not np.array_equal(documents, np.arange(bounds)):
        raise UserError(f"{idx_path}: its {bounds - 1} documents are not one sequence each; {fix}")
    return Pair(str(DTYPES[code]), sequences, total // itemsize)


# -------------------------------------------------------------------------------------------------- writing


class Writer:
    """Writes a pair, one document a sequence; nothing of it stays in memory.

    `final` is the path that errors name. The lengths go to the .idx at once, the rest when it is closed.
    """

    def __init__(self, bin_path: Path, idx_path: Path, dtype: np.dtype, final: Path) -> None:
        self._final = final
        self._code = next(code for code, known in DTYPES.items() if known == dtype)
        self.dtype = dtype
        self.num_sequences = 0
        self._hash = hashlib.sha256()
        self._bin = bin_path.open("wb", buffering=_BUFFER)
        self._idx = idx_path.open("w+b", buffering=_BUFFER)
        self._idx.write(bytes(HEADER.size))

    def write(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Add sequences of `lengths` tokens; `tokens` holds them one after the other."""
        data = np.ascontiguousarray(tokens, self.dtype).data.cast("B")
        with naming(self._final):
            self._bin.write(data)
            self._idx.write(np.ascontiguousarray(lengths, np.int32).data.cast("B"))
        self._hash.update(data)
        self.num_sequences += len(lengths)

    def close(self) -> tuple[str, str]:
        """Complete both files; returns the sha256 of each."""
        with naming(self._final):
            self._bin.close()
            header = HEADER.pack(MAGIC, 1, self._code, self.num_sequences, self.num_sequences + 1)
            for offsets in self._offsets():
                self._idx.write(offsets.data.cast("B"))
            for start in range(0, self.num_sequences + 1, _BLOCK):
                end = min(start + _BLOCK, self.num_sequences + 1)
                self._idx.write(np.arange(start, end, dtype=np.int64).data.cast("B"))
            self._idx.seek(0)
            self._idx.write(header)
            self._idx.seek(0)
            digest = hashlib.file_digest(self._idx, "sha256").hexdigest()  # type: ignore[arg-type]
            self._idx.close()
        return self._hash.hexdigest(), digest

    def _offsets(self) -> Iterator[np.ndarray]:
        """Where each sequence begins in the .bin, from the lengths in the .idx."""
        self._idx.flush()
        total = 0
        for start in range(0, self.num_sequences, _BLOCK):
            count = min(_BLOCK, self.num_sequences - start)
            data = os.pread(self._idx.fileno(), 4 * count, HEADER.size + 4 * start)
            ends = total + np.cumsum(np.frombuffer(data, np.int32), dtype=np.int64) * self.dtype.itemsize
            yield np.concatenate([[total], ends[:-1]])
            total = int(ends[-1])

    def abandon(self) -> None:
        """Let go of the files; what is buffered may have no room."""
        for file in (self._bin, self._idx):
            with contextlib.suppress(OSError):
                file.close()


class Shuffled:
    """Collects documents, and writes them to a `Writer` in an order drawn by `seed`.

    The documents wait in a file without a name in the directory of the .bin. A document is one sequence, or
    several that stay together. Each takes some 12 bytes of memory.
    """

    def __init__(self, writer: Writer, seed: tuple[int, ...]) -> None:
        self._writer = writer
        self._seed = seed
        self._file = tempfile.TemporaryFile(dir=writer._final.parent, buffering=_BUFFER)  # noqa: SIM115
        self._lengths = array("i")
        self._pieces = array("i")  # sequences of each document

    def write(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Add one document."""
        with naming(self._writer._final):
            self._file.write(np.ascontiguousarray(tokens, self._writer.dtype).data.cast("B"))
        self._lengths.extend(lengths.tolist())
        self._pieces.append(len(lengths))

    def finish(self) -> np.ndarray:
        """Write all documents; returns the new index of each sequence."""
        self._file.flush()
        lengths, pieces = np.frombuffer(self._lengths, np.int32), np.frombuffer(self._pieces, np.int32)
        first = np.concatenate([[0], np.cumsum(pieces, dtype=np.int64)])  # sequence of each document
        size = self._writer.dtype.itemsize
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64) * size])[first]
        order = np.random.default_rng(self._seed).permutation(len(pieces))
        index = np.empty(len(lengths), np.int64)
        count = 0
        for document in order:
            begin, end = first[document], first[document + 1]
            data = os.pread(self._file.fileno(), starts[document + 1] - starts[document], starts[document])
            self._writer.write(np.frombuffer(data, self._writer.dtype), lengths[begin:end])
            index[begin:end] = np.arange(count, count + end - begin)
            count += end - begin
        self._file.close()
        return index


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file where writing fails: the error of a full disk names none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
