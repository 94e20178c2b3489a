"""The header of Megatron's indexed dataset (.bin and .idx): what can be known of a pair without its tokens.

.bin  token ids of all sequences, one after the other
.idx  "MMIDIDX\\0\\0", version 1 (u64), dtype code (u8), number of sequences (u64), number of documents
      + 1 (u64); then the lengths of the sequences (i32), their byte offsets in .bin (i64), and the bounds
      of the documents, in sequences (i64)
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
# Megatron's codes of types. Token ids are int32, or uint16 where the vocabulary allows.
TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
SIZES = {"int32": 4, "uint16": 2}  # bytes of a token
LARGEST_UINT16 = 65536  # tokens of a vocabulary whose ids are uint16
MAX_SHARDS = 32766  # in a split of a blend: megatron-core numbers them in 16 bits


def paths(prefix: Path) -> tuple[Path, Path]:
    """The .bin and the .idx file of a prefix; the prefix may hold dots."""
    return prefix.with_name(f"{prefix.name}.bin"), prefix.with_name(f"{prefix.name}.idx")


def dtype_of(vocab_size: int) -> str:
    """The type of the ids of a vocabulary, as Megatron's tools and this workflow write it."""
    return "uint16" if vocab_size <= LARGEST_UINT16 else "int32"


def differences(prefix: Path, dtype: str | None) -> Iterator[str]:
    """What is wrong with a pair, by its header, its last sequence and its sizes, a line each.

    Args:
        dtype: what its ids must be; None where the vocabulary is not known.
    """
    bin_path, idx_path = paths(prefix)
    missing = [path for path in (bin_path, idx_path) if not path.is_file()]
    if len(missing) == 2 and prefix.is_dir():
        yield f"{prefix} is a directory; name the pairs in it, such as {prefix}/*"
        return
    yield from (f"{path}: no such file" for path in missing)
    if idx_path in missing:
        return
    size = idx_path.stat().st_size
    with idx_path.open("rb") as file:
        header = file.read(HEADER.size)
        if not header.startswith(MAGIC):
            yield f"{idx_path}: no index of Megatron (it does not begin with MMIDIDX)"
            return
        if len(header) < HEADER.size:
            yield f"{idx_path}: {size} bytes, shorter than the header of {HEADER.size}"
            return
        _, version, code, sequences, bounds = HEADER.unpack(header)
        if version != 1:
            yield f"{idx_path}: version {version} of the format, where 1 is known"
            return
        found = TYPES.get(code, f"type code {code}")
        if found not in SIZES:
            yield f"{idx_path}: holds {found}, where token ids are int32 or uint16"
            return
        if dtype and found != dtype:
            yield f"{idx_path}: holds {found}, where ids of this vocabulary are {dtype}"
        if bounds != sequences + 1:
            yield (
                f"{idx_path}: {bounds - 1} documents of {sequences} sequences, where each document is one "
                "sequence (it was made with --split-sentences?)"
            )
            return
        expected = HEADER.size + 12 * sequences + 8 * bounds
        if size != expected:
            yield f"{idx_path}: {size} bytes, where {sequences} sequences take {expected}"
            return
        tokens = _end(file.fileno(), sequences, SIZES[found])
    if bin_path not in missing and (there := bin_path.stat().st_size) != tokens:
        yield f"{bin_path}: {there} bytes, where {idx_path.name} promises {tokens}"


def _end(idx: int, sequences: int, itemsize: int) -> int:
    """Bytes of the .bin up to the end of the last sequence."""
    if not sequences:
        return 0
    lengths = HEADER.size
    length = struct.unpack("<i", os.pread(idx, 4, lengths + 4 * (sequences - 1)))[0]
    offset = struct.unpack("<q", os.pread(idx, 8, lengths + 4 * sequences + 8 * (sequences - 1)))[0]
    return int(offset + length * itemsize)
