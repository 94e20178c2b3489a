"""Tensors of a checkpoint in Megatron's `torch_dist` format, read by several threads to where they belong.

torch's loader reads one tensor after the other, through Python, to fresh host memory: 0.9 GB/s of a file in
the page cache, where the way to a GPU has 20. Here threads read pieces into a few buffers that the GPU copies
from.
"""

from __future__ import annotations

import collections
import functools
import io
import itertools
import math
import os
import pickle
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from snaketron.model.megatron.host_memory import PIECE, copy_threads

import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_inplace,
    extract_matching_values,
    merge,
    nested_values,
)
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

HEAD = 4096  # bytes in which the numbers of a stored tensor begin: about 700 before them say what they are

Take = Callable[[int, Tensor], None]


class Wanted(NamedTuple):
    """A tensor to read: how the model describes it, and what takes the part of it (flattened) piece by piece.

    `take(begin, values)` is called with 1-dimensional values that begin at number `begin` of the part.
    """

    shard: ShardedTensor | ShardedTensorFactory
    part: slice
    take: Take


class _Record(NamedTuple):
    """A tensor, or a part of one, as it lies in a file: an archive of `torch.save`."""

    file: int
    path: Path
    offset: int
    length: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Stored:
    """A checkpoint directory (iter_0000100) that is read from.

    Methods raise `OSError` or `CheckpointingException` where it is damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files: dict[str, int] = {}
        self._opening = threading.Lock()
        self._all_sizes: dict[str, dict[tuple[int, ...], tuple[int, ...]]] = {}

    def __enter__(self) -> Stored:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self.files.values():
            os.close(file)
        self.files.clear()

    @functools.cached_property
    def _metadata(self) -> Any:
        return FileSystemReader(self.directory).read_metadata()

    def read(self, wanted: Iterable[Wanted], device: torch.device) -> None:
        """Read tensors, each by pieces that `take` gets on `device`."""
        apart: list[Wanted] = []
        with ThreadPoolExecutor(copy_threads()) as pool:
            self._read_pieces(pool, self._pieces(wanted, apart), device)
            # What is stored in other parts is put together on the host, a few tensors at a time.
            for few in itertools.batched(apart, copy_threads()):
                for one, whole in zip(few, pool.map(self._put_together, [w.shard for w in few]), strict=True):
                    for begin, values in enumerate(whole.reshape(-1)[one.part].split(PIECE // 4)):
                        one.take(begin * (PIECE // 4), values.to(device))

    def _pieces(
        self, wanted: Iterable[Wanted], apart: list[Wanted]
    ) -> Iterator[tuple[_Record, int, int, int, Take]]:
        """What threads read: a record, which of its numbers, where these begin in the part, and the taker."""
        for one in wanted:
            record = self._record(one.shard)
            if record is None:
                apart.append(one)
                continue
            step = PIECE // record.dtype.itemsize
            for begin in range(one.part.start, one.part.stop, step):
                yield record, begin, min(step, one.part.stop - begin), begin - one.part.start, one.take

    def _read_pieces(
        self,
        pool: ThreadPoolExecutor,
        pieces: Iterator[tuple[_Record, int, int, int, Take]],
        device: torch.device,
    ) -> None:
        on_gpu = device.type == "cuda"
        free = collections.deque(
            (torch.empty(PIECE, dtype=torch.uint8, pin_memory=on_gpu), torch.cuda.Event() if on_gpu else None)
            for _ in range(2 * copy_threads())
        )
        running: collections.deque[tuple[Any, Any, tuple[_Record, int, int, int, Take]]] = collections.deque()
        for piece in itertools.chain(pieces, itertools.repeat(None)):
            if piece is not None:
                buffer, copied = free.popleft()
                if copied is not None:
                    copied.synchronize()
                record, begin, count, _, _ = piece
                running.append((pool.submit(self._fill, record, begin, count, buffer), buffer, piece))
            elif not running:
                break
            if piece is None or not free:
                future, buffer, (record, _, count, begin, take) = running.popleft()
                future.result()
                values = buffer[: count * record.dtype.itemsize].view(record.dtype)
                take(begin, values.to(device, non_blocking=True))
                event = torch.cuda.Event() if on_gpu else None
                if event is not None:
                    event.record()
                free.append((buffer, event))
        if on_gpu:
            torch.cuda.synchronize()  # the buffers are freed now

    def _described(self, shard: ShardedTensor) -> TensorStorageMetadata:
        """What the checkpoint says of a whole tensor."""
        found = self._metadata.state_dict_metadata.get(shard.key)
        if not isinstance(found, TensorStorageMetadata):
            raise CheckpointingException(f"{shard.key} is not in it")
        if tuple(found.size) != tuple(shard.global_shape) and not shard.allow_shape_mismatch:
            there, wanted = tuple(found.size), tuple(shard.global_shape)
            raise CheckpointingException(f"{shard.key} has the shape {there}, and the model's is {wanted}")
        return found

    def _record(self, shard: ShardedTensor | ShardedTensorFactory) -> _Record | None:
        """Where a tensor is stored, if the model has the same part of it as the checkpoint."""
        if isinstance(shard, ShardedTensorFactory):
            return None
        described = self._described(shard)
        index = MetadataIndex(shard.key, torch.Size(shard.global_offset))
        place = self._metadata.storage_data.get(index)
        shape = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
        if place is None or shape != self._sizes(shard.key).get(tuple(shard.global_offset)):
            return None
        return self._at(place, shape, described.properties.dtype)

    def _sizes(self, key: str) -> dict[tuple[int, ...], tuple[int, ...]]:
        """The shapes of the parts that a tensor is stored in, by where they begin."""
        if key not in self._all_sizes:
            chunks = self._metadata.state_dict_metadata[key].chunks
            self._all_sizes[key] = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in chunks}
        return self._all_sizes[key]

    def _at(self, place: Any, shape: tuple[int, ...], dtype: torch.dtype) -> _Record:
        path = self.directory / place.relative_path
        with self._opening:
            if place.relative_path not in self.files:
                self.files[place.relative_path] = os.open(path, os.O_RDONLY)
        file = self.files[place.relative_path]
        return _Record(file, path, place.offset, place.length, shape, dtype)

    def _put_together(self, shard: ShardedTensor | ShardedTensorFactory) -> Tensor:
        """A tensor of the model in host memory, from all parts of it that are stored."""
        if isinstance(shard, ShardedTensorFactory):
            parts = shard.build()
            dict_list_map_inplace(self._put_together, parts)
            return shard.merge_fn(parts)
        described = self._described(shard)
        shape = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
        whole = torch.zeros(shape, dtype=described.properties.dtype)
        found = 0
        for offsets, sizes in self._sizes(shard.key).items():
            begins = [max(a, b) for a, b in zip(offsets, shard.global_offset, strict=True)]
            ends = [
                min(a + n, b + m)
                for a, n, b, m in zip(offsets, sizes, shard.global_offset, shape, strict=True)
            ]
            if any(begin >= end for begin, end in zip(begins, ends, strict=True)):
                continue
            index = MetadataIndex(shard.key, torch.Size(offsets))
            record = self._at(self._metadata.storage_data[index], sizes, described.properties.dtype)
            part = torch.empty(sizes, dtype=record.dtype)
            self._fill(record, 0, part.numel(), part.view(-1).view(torch.uint8))
            here, there = (
                tuple(slice(b - o, e - o) for b, e, o in zip(begins, ends, origin, strict=True))
                for origin in (shard.global_offset, offsets)
            )
            whole[here] = part[there]
            found += part[there].numel()
        if found != whole.numel() and not shard.allow_shape_mismatch:
            raise CheckpointingException(f"{shard.key}: {found} of {whole.numel()} numbers are in it")
        return whole.view(shard.local_shape)

    def _fill(self, record: _Record, begin: int, count: int, buffer: Tensor) -> None:
        """Read `count` numbers of a record, from number `begin` on, into a buffer of bytes."""
        size = record.dtype.itemsize
        target = buffer[: count * size]
        first = _first_number(os.pread(record.file, min(HEAD, record.length), record.offset), record)
        if first is None:  # not as `torch.save` writes a whole tensor today
            target.copy_(_loaded(record).reshape(-1)[begin : begin + count].contiguous().view(torch.uint8))
            return
        left, at = memoryview(target.numpy()), record.offset + first + begin * size
        while len(left):
            read = os.preadv(record.file, [left], at)
            if not read:
                raise CheckpointingException(f"{record.path.name} ends at byte {at}, within a tensor")
            left, at = left[read:], at + read


def _first_number(head: bytes, record: _Record) -> int | None:
    """Where the numbers begin in an archive of `torch.save`; None where it is not a plain tensor.

    The archive is a zip file: entries behind headers of 30 bytes, a name and a filling.
    """
    name = head.find(b"archive/data/0")
    if name < 30 or head[:4] != b"PK\3\4" or head[name - 30 : name - 26] != b"PK\3\4":
        return None
    stored_as = struct.unpack("<H", head[name - 22 : name - 20])[0]
    lengths = [struct.unpack("<HH", head[at + 26 : at + 30]) for at in (0, name - 30)]
    description, first = 30 + sum(lengths[0]), name + sum(lengths[1])
    count = math.prod(record.shape)
    fits = first + count * record.dtype.itemsize <= record.length
    if stored_as or not fits or not head.startswith(b"archive/data.pkl", 30):
        return None
    try:
        found = _Description(head[description:]).load()
    except (pickle.UnpicklingError, EOFError, IndexError, ValueError, TypeError, AttributeError):
        return None
    return first if found == (_NAMES.get(record.dtype), 0, record.shape, count) else None


_NAMES = {torch.float32: "FloatStorage", torch.bfloat16: "BFloat16Storage"}


class _Description(pickle.Unpickler):
    """What an archive says of its tensor: the kind of its numbers, their offset, its shape and its size."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content))

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"{module}.{name} is not of a plain tensor")

    def persistent_load(self, pid: Any) -> Any:
        return pid

    @staticmethod
    def _tensor(storage: Any, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> Any:
        in_order, step = True, 1
        for size, stride in zip(reversed(shape), reversed(strides), strict=True):
            in_order = in_order and (size == 1 or stride == step)
            step *= size
        return (storage[1], offset, tuple(shape), storage[4]) if in_order else None


def _loaded(record: _Record) -> Tensor:
    """A record by torch's own loader."""
    with record.path.open("rb") as file:
        file.seek(record.offset)
        content = file.read(record.length)
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, LookupError, EOFError, pickle.UnpicklingError) as error:
        problem = str(error).partition("\n")[0]
        raise CheckpointingException(f"{record.path.name}, byte {record.offset}: {problem}") from error


class Loading(TorchDistLoadShardedStrategy):
    """megatron-core's way to load, with tensors read by `Stored`."""

    def __init__(self, stored: Stored, device: torch.device) -> None:
        super().__init__()
        self.stored, self.device = stored, device

    def load(self, sharded_state_dict: Any, checkpoint_dir: Path, async_strategy: str = "mcore") -> Any:
        tensors, others = extract_matching_values(sharded_state_dict, _is_plain)
        loaded = super().load(others, checkpoint_dir, async_strategy) if any(nested_values(others)) else {}
        wanted = [
            Wanted(shard, slice(0, shard.data.numel()), functools.partial(_copy, shard.data))
            for shard in nested_values(tensors)
        ]
        self.stored.read(wanted, self.device)
        dict_list_map_inplace(lambda shard: shard.data, tensors)
        return merge(loaded, tensors)


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor in its place, and no quantized one."""
    return (
        isinstance(value, ShardedTensor)
        and type(value.data) in (Tensor, torch.nn.Parameter)
        and value.data.is_contiguous()
    )


def _copy(target: Tensor, begin: int, values: Tensor) -> None:
    target.detach().view(-1)[begin : begin + len(values)].copy_(values)
