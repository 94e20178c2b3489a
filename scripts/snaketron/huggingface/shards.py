"""Files of tensors in the safetensors format, written one tensor at a time, and what a directory holds.

The library of the format writes a file from tensors that are all in memory, 5 GB for a file of the usual
size; so the header, which is a line of JSON, is written here. The library reads.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snaketron.files import read_json, sha256, to_json, write_json
from snaketron.huggingface.index import INDEX, missing_files, read_index
from snaketron.lineage.record import Entry
from snaketron.sources.formats import FETCH, IS_POINTER, is_pointer

import torch
from safetensors import SafetensorError, safe_open

SHARD_BYTES = 5_000_000_000  # of a file, at most; a single tensor may be larger
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Described:
    """A tensor before it is there."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def plan(tensors: Iterable[Described], shard_bytes: int = SHARD_BYTES) -> dict[str, list[Described]]:
    """The files by name, each with its tensors, in order: a file is full before the next begins."""
    shards: list[list[Described]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.bytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.bytes
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def write_shard(path: Path, tensors: Sequence[Described], make: Callable[[str], torch.Tensor]) -> Entry:
    """Write a file; `make` gives the tensor of a name, and one of them is in memory at a time.

    Returns its name, size and hash, which is computed on the way.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        offsets = [start, start + tensor.bytes]
        header[tensor.name] = {"dtype": _CODES[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
        start += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    written = hashlib.sha256()
    with path.open("wb") as file:
        for piece in (struct.pack("<Q", len(text)), text):
            written.update(piece)
            file.write(piece)
        for tensor in tensors:
            value = make(tensor.name)
            if (tuple(value.shape), value.dtype) != (tensor.shape, tensor.dtype):
                raise AssertionError(f"{tensor.name}: {value.shape} {value.dtype} is not what was planned")
            flat = value.contiguous().view(-1).view(torch.uint8).numpy()
            written.update(flat)
            file.write(flat)
            del value, flat  # before the next one is made
    return Entry(path.name, str(path), written.hexdigest(), path.stat().st_size)


class Finished:
    """The files of a directory that an earlier process has written whole, with their hashes.

    They are listed in a file of it, which is removed at the end. A file that is not listed, or is another
    than the list says, is written again.
    """

    def __init__(self, directory: Path, of: str) -> None:
        """`of` identifies what is written; files of anything else are deleted."""
        self._list, self._of = directory / ".finished.json", of
        known = read_json(self._list) if self._list.exists() else {}
        files: dict[str, str] = known.get("files", {}) if known.get("of") == of else {}
        for path in directory.iterdir():
            if path.name not in files or sha256(path) != files[path.name]:
                path.unlink()
        self._files = {name: digest for name, digest in files.items() if (directory / name).exists()}
        self._write()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def entry(self, name: str) -> Entry:
        path = self._list.with_name(name)
        return Entry(name, str(path), self._files[name], path.stat().st_size)

    def add(self, entry: Entry) -> None:
        self._files[entry.name] = entry.sha256
        self._write()

    def close(self) -> None:
        self._list.unlink()

    def _write(self) -> None:
        write_json(self._list, {"of": self._of, "files": self._files})


def write_index(path: Path, shards: Mapping[str, Sequence[Described]]) -> None:
    """Write which file each tensor is in."""
    tensors = [(name, tensor) for name, shard in shards.items() for tensor in shard]
    total = sum(tensor.bytes for _, tensor in tensors)
    weights = {tensor.name: name for name, tensor in sorted(tensors, key=lambda one: one[1].name)}
    path.write_bytes(to_json({"metadata": {"total_size": total}, "weight_map": weights}))


class Shards:
    """The tensors of a directory: which there are, and their rows."""

    def __init__(self, directory: Path) -> None:
        """Look at every file, and gather all that is wrong in `problems`."""
        self.directory = directory
        self.described: dict[str, tuple[tuple[int, ...], str]] = {}  # shape and code of the type
        self._files: dict[str, Any] = {}  # by tensor, the open file that holds it
        self.paths: list[Path] = []
        index, self.problems = read_index(directory)
        self.problems += missing_files(directory, index)
        for path in sorted(directory.glob("*.safetensors")):
            if path.exists():  # and is no link to nothing
                self._open(path.name, index)
        read = {path.name for path in self.paths}
        lost = [tensor for tensor, name in index.items() if name in read and tensor not in self.described]
        self.problems += [f"{tensor}: listed in {INDEX}, and not in {index[tensor]}" for tensor in lost]

    def _open(self, name: str, index: Mapping[str, str]) -> None:
        path = self.directory / name
        try:
            file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            why = f"{IS_POINTER} and not the tensors; {FETCH}" if is_pointer(path) else f"damaged ({error})"
            self.problems.append(f"{name}: {why}")
            return
        self.paths.append(path)
        if index and name not in index.values():
            self.problems.append(f"{name}: not in {INDEX}; is it another copy? move it away")
            return
        for tensor in file.keys():  # noqa: SIM118  a file of safetensors is no mapping
            if tensor in self.described:
                self.problems.append(f"{tensor}: in {name} and in another file")
            elif index and index.get(tensor) != name:
                self.problems.append(f"{tensor}: in {name}, and {INDEX} says {index.get(tensor, 'nothing')}")
            else:
                part = file.get_slice(tensor)
                self.described[tensor] = tuple(part.get_shape()), part.get_dtype()
                self._files[tensor] = file

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a tensor."""
        return self._files[name].get_slice(name)[start:stop]
