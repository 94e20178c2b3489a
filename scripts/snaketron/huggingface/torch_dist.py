"""Tensors of a checkpoint in Megatron's `torch_dist` format, read and written one by one, without a model.

The format is torch's distributed checkpoint, in any layout: a tensor lies in parts of any shape, in any file.
`dist_checkpointing` of megatron-core reads and writes all tensors of a model at once.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snaketron.huggingface.metadata import Listed
from snaketron.log import UserError

import torch
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
)
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

COMMON = "common_state/shard_0_1"  # where megatron-core keeps what is no tensor
# About the size of a file. The writer of torch keeps what it wrote to a file until it is closed.
FILE_BYTES = 1_000_000_000


def is_finite(values: torch.Tensor) -> bool:
    """Whether all numbers are finite: NaN would be both extremes. 40 times as fast as `isfinite`."""
    least, greatest = values.aminmax()
    return bool(least.isfinite() and greatest.isfinite())


class Reader:
    """The tensors of one checkpoint directory (iter_0000100)."""

    def __init__(self, directory: Path) -> None:
        """`UserError` where the checkpoint has no readable list of them."""
        self.directory = directory
        self._reader = FileSystemReader(directory)
        try:
            self._metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        except Exception as error:  # a damaged pickle fails in many ways
            raise UserError(
                f"{directory}: not a torch_dist checkpoint, or damaged ({type(error).__name__}: {error})"
            ) from error
        self.tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            key: (tuple(value.size), value.properties.dtype)
            for key, value in self._metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata) and not key.startswith("optimizer.")
        }

    @property
    def listed(self) -> Listed:
        """As `metadata.listed_tensors` gives them."""
        return {key: (shape, str(dtype)) for key, (shape, dtype) in self.tensors.items()}

    def read(self, key: str) -> torch.Tensor:
        """A whole tensor; `UserError` where a file is missing or damaged."""
        try:
            shape, dtype = self.tensors[key]
            state = {key: torch.empty(shape, dtype=dtype)}
            planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about torch's own calls of torch
                planner.set_up_planner(state, self._metadata, is_coordinator=True)
                self._reader.read_data(planner.create_local_plan(), planner).wait()
        except Exception as error:  # damage shows in many ways, such as names that are no UTF-8
            raise UserError(
                f"{self.directory}: {key} cannot be read ({type(error).__name__}: {error}); the "
                "checkpoint is damaged"
            ) from error
        return state[key]


class LastRead:
    """Reads tensors, and remembers the last one alone: all its experts are asked for in a row."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._last: tuple[str, torch.Tensor] = ("", torch.empty(0))

    def __call__(self, key: str) -> torch.Tensor:
        if self._last[0] != key:
            self._last = ("", torch.empty(0))  # before the next one is there
            self._last = key, self.reader.read(key)
        return self._last[1]


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor to write: all of it, or the part of one expert."""

    key: str
    shape: tuple[int, ...]  # of the whole tensor
    dtype: torch.dtype
    expert: int | None
    make: Callable[[], torch.Tensor]  # gives the values when it is written

    def item(self) -> WriteItem:
        offsets = [0] * len(self.shape)
        sizes = list(self.shape)
        if self.expert is not None:
            offsets[0], sizes[0] = self.expert, 1
        return WriteItem(
            index=MetadataIndex(self.key, offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)),
                properties=TensorProperties(dtype=self.dtype),
                size=torch.Size(self.shape),
            ),
        )


class _Planner(DefaultSavePlanner):
    """Makes each tensor when the writer asks for it, so that one is in memory at a time."""

    def __init__(self, chunks: Sequence[Chunk], common: bytes) -> None:
        super().__init__()
        self.chunks = {(chunk.key, chunk.expert): chunk for chunk in chunks}
        self.common = common

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type is WriteItemType.BYTE_IO:
            return io.BytesIO(self.common)
        index = write_item.index
        sizes = write_item.tensor_data.chunk.sizes  # type: ignore[union-attr]
        chunk = self.chunks.get((index.fqn, None)) or self.chunks[index.fqn, index.offset[0]]  # type: ignore[index]
        return chunk.make().view(sizes)


def write(directory: Path, chunks: Sequence[Chunk], progress: dict[str, Any]) -> None:
    """Write a checkpoint that megatron-core reads in any layout; its tensors are made in order.

    Raises `OSError` or `RuntimeError` where it cannot be written.
    """
    common = io.BytesIO()
    torch.save([{"progress": progress}], common)
    planner = _Planner(chunks, common.getvalue())
    writer = FileSystemWriter(directory)
    writer.set_up_storage_writer(is_coordinator=True)
    first = WriteItem(
        index=MetadataIndex(COMMON),
        type=WriteItemType.BYTE_IO,
        bytes_io_data=BytesIOWriteData(nbytes=len(planner.common)),
    )
    # A plan is what one process writes, to one file.
    plans = [SavePlan(items) for items in _files([first], chunks)]
    plans, metadata = create_default_global_save_plan(plans)
    plans = writer.prepare_global_plan([writer.prepare_local_plan(plan) for plan in plans])
    results = [writer.write_data(plan, planner).wait() for plan in plans]
    writer.finish(metadata, results)
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (directory / "metadata.json").write_text(json.dumps(config), encoding="utf-8")


def _files(first: list[WriteItem], chunks: Sequence[Chunk]) -> list[list[WriteItem]]:
    """The items, cut into files of about `FILE_BYTES`."""
    files, size = [first], 0
    for chunk in chunks:
        item = chunk.item()
        if size > FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(item)
        size += item.tensor_data.chunk.sizes.numel() * chunk.dtype.itemsize  # type: ignore[union-attr]
    return files
