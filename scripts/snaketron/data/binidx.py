"""Megatron's indexed dataset (.bin and .idx): the check that a pair is complete, without torch.

.bin  token ids of all sequences, one after the other
.idx  "MMIDIDX\\0\\0", version 1 (u64), dtype code (u8), number of sequences (u64), number of documents
      + 1 (u64); then the lengths of the sequences (i32), their byte offsets in .bin (i64), and the bounds
      of the documents, in sequences (i64)
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from snaketron.log import UserError

import numpy as np

DTYPES: dict[int, np.dtype] = {4: np.dtype(np.int32), 8: np.dtype(np.uint16)}  # the codes that we write
_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"


@dataclass(frozen=True)
class Pair:
    """What a complete .bin/.idx pair holds."""

    dtype: str
    sequences: int
    tokens: int
    bin_bytes: int
    idx_bytes: int


def paths(prefix: Path) -> tuple[Path, Path]:
    """The .bin and the .idx file of a prefix; the prefix may hold dots."""
    return prefix.with_name(f"{prefix.name}.bin"), prefix.with_name(f"{prefix.name}.idx")


def check(prefix: Path, fix: str = "remove its record and run again") -> Pair:
    """Check that both files exist and agree in every offset; a `UserError` names both numbers and `fix`."""
    bin_path, idx_path = paths(prefix)
    bin_bytes, idx_bytes = size(bin_path, fix), size(idx_path, fix)
    if idx_bytes < _HEADER.size:
        raise UserError(f"{idx_path}: {idx_bytes} bytes, shorter than the header of {_HEADER.size}; {fix}")
    with idx_path.open("rb") as file:
        magic, version, code, sequences, bounds = _HEADER.unpack(file.read(_HEADER.size))
    if (magic, version) != (_MAGIC, 1) or code not in DTYPES:
        raise UserError(f"{idx_path}: not an index of token ids (version {version}, type code {code}); {fix}")
    expected = _HEADER.size + 12 * sequences + 8 * (sequences + 1)
    if bounds != sequences + 1 or idx_bytes != expected:
        raise UserError(
            f"{idx_path}: {sequences} sequences and {bounds - 1} documents in {idx_bytes} bytes, "
            f"where one document a sequence takes {expected}; {fix}"
        )
    lengths, offsets, documents = _arrays(idx_path, sequences)
    itemsize = DTYPES[code].itemsize
    ends = np.cumsum(lengths, dtype=np.int64) * itemsize
    total = int(ends[-1]) if sequences else 0
    if total != bin_bytes:
        raise UserError(f"{bin_path}: {bin_bytes} bytes, where {idx_path.name} promises {total}; {fix}")
    if sequences and (lengths.min() < 1 or offsets[0] != 0 or not np.array_equal(offsets[1:], ends[:-1])):
        raise UserError(f"{idx_path}: its offsets do not follow from its {sequences} lengths; {fix}")
    if not np.array_equal(documents, np.arange(bounds)):
        raise UserError(f"{idx_path}: its {bounds - 1} documents are not one sequence each; {fix}")
    return Pair(str(DTYPES[code]), sequences, total // itemsize, bin_bytes, idx_bytes)


def size(path: Path, fix: str) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {fix}") from None


def _arrays(idx_path: Path, sequences: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with idx_path.open("rb") as file:
        file.seek(_HEADER.size)
        return (
            np.fromfile(file, np.int32, sequences),
            np.fromfile(file, np.int64, sequences),
            np.fromfile(file, np.int64, sequences + 1),
        )
