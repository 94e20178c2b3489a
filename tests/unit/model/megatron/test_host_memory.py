"""Host memory for checkpoints: what is taken stays as it is until all of it is used again."""

from __future__ import annotations

import snaketron.model  # noqa: F401  before megatron
from snaketron.model.megatron import host_memory
from snaketron.model.megatron.host_memory import HostMemory

import pytest
import torch


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> HostMemory:
    """Memory in blocks of 4,096 bytes, copied 256 bytes at a time."""
    monkeypatch.setattr(host_memory, "BLOCK", 4096)
    monkeypatch.setattr(host_memory, "PIECE", 256)
    monkeypatch.setattr(host_memory, "ROOM", 100)
    return HostMemory()


def test_tensors_have_their_own_storage_and_the_same_memory_for_the_next_checkpoint(memory: HostMemory):
    """Of 4,000, 4 and 5,000 bytes: the second fits behind the first, the third has its own block."""
    memory.reuse()
    first = [memory.take(n) for n in (1000, 1, 1250, 0)]
    assert [t.numel() for t in first] == [1000, 1, 1250, 0]
    assert all(t.untyped_storage().nbytes() == 4 * t.numel() for t in first)  # what torch.save writes
    assert first[1].data_ptr() - first[0].data_ptr() == 4032  # 63 times 64
    assert [len(block) for block in memory.blocks] == [4096, 5056]
    memory.reuse()
    again = [memory.take(n) for n in (1000, 1, 1250)]
    assert [t.data_ptr() for t in again] == [t.data_ptr() for t in first[:3]]
    assert len(memory.blocks) == 2


def test_reserved_memory_is_taken_and_a_larger_tensor_leaves_it_for_the_others(memory: HostMemory):
    """A small training gets what it needs, and no whole block."""
    memory.reserve(5000)  # bytes: a block, and 904 with 100 more
    memory.reuse()
    assert [len(block) for block in memory.blocks] == [4096, 1004]
    memory.take(2000)
    assert memory.used == [0, 0, 8000]
    memory.take(1000), memory.take(200)
    assert memory.used == [4032, 832, 8000]


def test_a_copy_is_made_of_pieces_and_converted(memory: HostMemory):
    """64 numbers of fp32 are 256 bytes."""
    values = torch.randn(150, generator=torch.Generator().manual_seed(1)).bfloat16()
    asked = []

    def give(begin: int, end: int) -> torch.Tensor:
        asked.append((begin, end))
        return values[begin:end].float()

    copied = memory.copy(give, 150)
    memory.wait()
    assert asked == [(0, 64), (64, 128), (128, 150)]
    assert copied.dtype == torch.float32 and torch.equal(copied, values.float())


def test_what_is_on_the_host_is_written_as_it_is(memory: HostMemory):
    tensor, item = torch.ones(2, 3), object()
    [(path, key, (objects, tensors))] = memory.preload([("file", "key", (["bytes"], [(item, tensor)]))])
    assert (path, key, objects) == ("file", "key", ["bytes"])
    assert tensors[0][0] is item and tensors[0][1] is tensor and not memory.blocks
