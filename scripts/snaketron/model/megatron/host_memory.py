"""Host memory for what a checkpoint has of the GPU, which lasts from one checkpoint to the next.

Memory that is new to a process is cleared by the kernel page by page: 1 GB/s with one thread, while the
training stands still. Here it is touched once, and several threads move what the GPU copies into a few pinned
buffers. It is shared with the process that writes in the background, which starts without a copy of its page
tables.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

BLOCK = 2**30  # bytes of a piece of memory, in which there are many tensors
PIECE = 16 * 2**20  # bytes that are copied at once
ROOM = 2**20  # bytes more than a checkpoint is expected to have, such as of what aligns tensors
LINE = 64  # bytes to whose multiples a tensor is aligned, as in the files
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14


def copy_threads() -> int:
    """Threads that copy: half of the CPUs of this process, since others read data; 8 fill a GPU's link."""
    return min(8, max(2, len(os.sched_getaffinity(0)) // 2))


class HostMemory:
    """Tensors that live until `reuse`, in memory that lasts."""

    def __init__(self) -> None:
        self.blocks: list[mmap.mmap] = []
        self.used: list[int] = []  # bytes of each block
        self.pool: ThreadPoolExecutor | None = None
        self.buffers: collections.deque[tuple[Tensor, Any, Future[None] | None]] = collections.deque()
        self.reserving: threading.Thread | None = None

    def reuse(self) -> None:
        """Begin anew: nothing that was taken is needed any more."""
        if self.reserving is not None:
            self.reserving.join()
            self.reserving = None
        self.used = [0] * len(self.blocks)

    def reserve(self, size: int) -> None:
        """Get so many bytes ready, beside what else happens; nothing may be taken before `reuse`."""

        def get_ready() -> None:
            for begin in range(0, size, BLOCK):
                self._add(min(BLOCK, size - begin + ROOM))
            with ThreadPoolExecutor(copy_threads()) as pool:
                list(pool.map(_touch, self.blocks))

        self.reserving = threading.Thread(target=get_ready, daemon=True)
        self.reserving.start()

    def _add(self, size: int) -> None:
        block = mmap.mmap(-1, size)
        with contextlib.suppress(OSError):  # a kernel that has no large pages, or not for shared memory
            block.madvise(mmap.MADV_HUGEPAGE)
        self.blocks.append(block)
        self.used.append(0)

    def take(self, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of `count` numbers, with a storage of its own; what is in it is not defined."""
        if not count:
            return torch.empty(0, dtype=dtype)
        size = -(-count * dtype.itemsize // LINE) * LINE
        room = (i for i, block in enumerate(self.blocks) if self.used[i] + size <= len(block))
        place = next(room, len(self.blocks))
        if place == len(self.blocks):
            self._add(max(size, BLOCK))
        taken = torch.frombuffer(self.blocks[place], dtype=dtype, count=count, offset=self.used[place])
        self.used[place] += size
        return taken

    def copy(
        self, give: Callable[[int, int], Tensor], count: int, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """A copy of `count` numbers, complete after `wait`; `give(begin, end)` gives a range of them."""
        target = self.take(count, dtype)
        step = PIECE // dtype.itemsize
        for begin in range(0, count, step):
            values = give(begin, min(begin + step, count))
            if values.is_cuda:
                self._move(values, target[begin : begin + len(values)])
            else:
                target[begin : begin + len(values)].copy_(values)
        return target

    def _move(self, values: Tensor, target: Tensor) -> None:
        """Copy from the GPU to a buffer, and have a thread copy from that when it is there."""
        if self.pool is None:
            # A thread begins with the first GPU, where waiting for another one's event would take memory.
            here = torch.cuda.current_device()
            self.pool = ThreadPoolExecutor(
                copy_threads(), initializer=torch.cuda.set_device, initargs=(here,)
            )
        if len(self.buffers) < 2 * copy_threads():
            buffer = torch.empty(PIECE, dtype=torch.uint8, pin_memory=True)
            there = torch.cuda.Event(blocking=True)
        else:
            buffer, there, before = self.buffers.popleft()
            if before is not None:
                before.result()
        part = buffer[: target.numel() * target.element_size()].view(target.dtype)
        part.copy_(values, non_blocking=True)
        there.record()

        def move() -> None:
            there.synchronize()
            ctypes.memmove(target.data_ptr(), part.data_ptr(), part.numel() * part.element_size())

        self.buffers.append((buffer, there, self.pool.submit(move)))

    def wait(self) -> None:
        """Return when all copies are complete, and no thread is left: a process may be forked."""
        for _ in range(len(self.buffers)):
            buffer, there, move = self.buffers.popleft()
            if move is not None:
                move.result()
            self.buffers.append((buffer, there, None))
        if self.pool is not None:
            self.pool.shutdown()
            self.pool = None

    def preload(self, buckets: Iterable[tuple[Any, Any, tuple[list[Any], list[Any]]]]) -> list[Any]:
        """What megatron-core's `FileSystemWriterAsync.preload_tensors` gives: files with host tensors."""
        loaded = []
        for path, key, (objects, tensors) in buckets:
            loaded.append(
                (path, key, (objects, [(item, self._preloaded(tensor)) for item, tensor in tensors]))
            )
        self.wait()
        return loaded

    def _preloaded(self, tensor: Tensor) -> Tensor:
        if not tensor.is_cuda or type(tensor) is not Tensor or not tensor.is_contiguous():
            return tensor.to("cpu")
        flat = tensor.view(-1)
        return self.copy(lambda begin, end: flat[begin:end], len(flat), tensor.dtype).view(tensor.shape)


def _touch(block: mmap.mmap) -> None:
    """Have the kernel give the memory now; without an effect where it is too old for that."""
    start = torch.frombuffer(block, dtype=torch.uint8).data_ptr()
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise(ctypes.c_void_p(start), ctypes.c_size_t(len(block)), _POPULATE_WRITE)
