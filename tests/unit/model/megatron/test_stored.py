"""Tensors of a checkpoint, read in pieces: each number where it belongs, and damage is named."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable
from pathlib import Path

import snaketron.model  # noqa: F401  before megatron
from snaketron.huggingface.torch_dist import Chunk, write
from snaketron.model.megatron import stored
from snaketron.model.megatron.stored import Stored, Wanted, _first_number, _Record

import pytest
import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

MATRIX = torch.arange(12.0).view(3, 4)
EXPERTS = torch.arange(100.0, 124.0).view(2, 3, 4)
CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A matrix of 3 x 4 in one piece, one in bf16, and two experts of 3 x 4 each in its own."""
    chunks = [
        Chunk("matrix", (3, 4), torch.float32, None, lambda: MATRIX),
        Chunk("short", (3, 4), torch.bfloat16, None, lambda: MATRIX.bfloat16()),
        Chunk("experts", (2, 3, 4), torch.float32, 0, lambda: EXPERTS[0]),
        Chunk("experts", (2, 3, 4), torch.float32, 1, lambda: EXPERTS[1]),
    ]
    write(tmp_path, chunks, {})
    return tmp_path


def shard(
    key: str, whole: tuple[int, ...], offset: tuple[int, ...], shape: tuple[int, ...], prepended: int = 0
):
    """The part of a tensor that a model has, from `offset` on."""
    dtype = torch.float32
    return ShardedTensor(key, None, dtype, shape, whole, offset, None, prepend_axis_num=prepended)


def read(directory: Path, shard: ShardedTensor | ShardedTensorFactory, part: slice) -> list[float]:
    """The numbers that `take` gets, which must not overlap or leave a gap."""
    found: list[float] = []

    def take(begin: int, values: torch.Tensor) -> None:
        assert begin == len(found) and len(values)
        found.extend(values.tolist())

    with Stored(directory) as checkpoint:
        checkpoint.read([Wanted(shard, part, take)], CPU)
    return found


def test_a_tensor_is_read_in_pieces_and_of_one_only_a_part(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stored, "PIECE", 20)  # bytes: 5 numbers in fp32, 10 in bf16
    whole = shard("matrix", (3, 4), (0, 0), (3, 4))
    assert read(checkpoint, whole, slice(0, 12)) == [float(i) for i in range(12)]
    assert read(checkpoint, whole, slice(3, 10)) == [3, 4, 5, 6, 7, 8, 9]
    assert read(checkpoint, shard("short", (3, 4), (0, 0), (3, 4)), slice(0, 12)) == MATRIX.flatten().tolist()
    second = shard("experts", (2, 3, 4), (1, 0, 0), (3, 4), prepended=1)
    assert read(checkpoint, second, slice(0, 12)) == [float(i) for i in range(112, 124)]


def test_a_model_with_other_parts_has_them_put_together(checkpoint: Path):
    """The last two columns of the matrix, and the middle rows of both experts."""
    columns = shard("matrix", (3, 4), (0, 2), (3, 2))
    assert read(checkpoint, columns, slice(1, 6)) == [3, 6, 7, 10, 11]
    rows = shard("experts", (2, 3, 4), (0, 1, 0), (2, 1, 4))
    assert read(checkpoint, rows, slice(0, 8)) == [104, 105, 106, 107, 116, 117, 118, 119]


def test_a_file_that_two_threads_ask_for_is_opened_once(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    """The second to open it took the place of the first, which stayed open."""
    opened: list[str] = []

    def slowly(path: str, flags: int, open_file: Callable[[str, int], int] = os.open) -> int:
        opened.append(path)
        time.sleep(0.05)
        return open_file(path, flags)

    monkeypatch.setattr(stored, "copy_threads", lambda: 2)
    monkeypatch.setattr(stored.os, "open", slowly)
    columns = Wanted(shard("matrix", (3, 4), (0, 2), (3, 2)), slice(0, 6), lambda *_: None)
    with Stored(checkpoint) as several:
        several.read([columns, columns], CPU)
    assert len(opened) == 1


def test_a_tensor_that_is_stored_under_several_names_is_merged(checkpoint: Path):
    def build(key: str, data: torch.Tensor, replica: object, flattened: None) -> dict[str, ShardedTensor]:
        return {
            "up": shard("matrix", (3, 4), (0, 0), (1, 4)),
            "down": shard("matrix", (3, 4), (2, 0), (1, 4)),
        }

    def merge(parts: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([parts["up"], parts["down"]])

    factory = ShardedTensorFactory("both", torch.empty(2, 4), build, merge)
    assert read(checkpoint, factory, slice(0, 8)) == [0, 1, 2, 3, 8, 9, 10, 11]


def test_what_is_not_there_or_of_another_shape_is_named(checkpoint: Path):
    with pytest.raises(CheckpointingException, match="other is not in it"):
        read(checkpoint, shard("other", (3, 4), (0, 0), (3, 4)), slice(0, 12))
    with pytest.raises(
        CheckpointingException, match=r"matrix has the shape \(3, 4\), and the model's is \(4, 4\)"
    ):
        read(checkpoint, shard("matrix", (4, 4), (0, 0), (4, 4)), slice(0, 16))


@pytest.mark.parametrize("damage", ["cut within the numbers", "cut before them", "overwritten"])
def test_a_damaged_file_is_named(checkpoint: Path, damage: str):
    with Stored(checkpoint) as whole:
        record = whole._record(shard("experts", (2, 3, 4), (1, 0, 0), (3, 4), prepended=1))
        assert record is not None
    content = record.path.read_bytes()
    numbers = content.index(EXPERTS[1].numpy().tobytes())
    if damage == "overwritten":
        record.path.write_bytes(bytes(len(content)))
    else:
        record.path.write_bytes(content[: numbers + 8 if "within" in damage else record.offset + 100])
    with pytest.raises(CheckpointingException, match=record.path.name) as error:
        read(checkpoint, shard("experts", (2, 3, 4), (1, 0, 0), (3, 4), prepended=1), slice(0, 12))
    assert "\n" not in str(error.value)


def test_only_a_plain_tensor_in_order_is_read_without_torch():
    """A transposed one, half of another, and one of integers are torch's to read."""

    def first(tensor: torch.Tensor, dtype: torch.dtype = torch.float32) -> int | None:
        file = io.BytesIO()
        torch.save(tensor, file)
        content = file.getvalue()
        record = _Record(0, Path("file"), 0, len(content), tuple(tensor.shape), dtype)
        found = _first_number(content[:4096], record)
        if found is not None:
            assert content[found:].startswith(tensor.view(-1).view(torch.uint8).numpy().tobytes())
        return found

    assert first(MATRIX) and first(MATRIX.bfloat16(), torch.bfloat16) and first(torch.ones(1, 1))
    assert first(MATRIX.T) is None
    assert first(MATRIX[1:]) is None
    assert first(MATRIX.int()) is None and first(MATRIX, torch.bfloat16) is None
    assert _first_number(bytes(4096), _Record(0, Path("file"), 0, 4096, (2,), torch.float32)) is None
