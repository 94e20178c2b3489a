"""Triton's kernels compiled by several processes, in the time that a benchmark has for it."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from multiprocessing.sharedctypes import RawArray
from typing import Any

import torch
from triton.errors import TritonError

PR_SET_PDEATHSIG = 1  # prctl(2)


def compiled[Task](
    tasks: Sequence[Task], compile_one: Callable[[Task], object], jobs: int, until: float
) -> list[Task]:
    """The tasks that processes compiled in time, the first ones first."""
    context = multiprocessing.get_context("spawn")  # a forked process cannot use the GPU
    done = RawArray("b", len(tasks))
    children = [
        context.Process(
            target=_compile, args=(tasks, compile_one, part, jobs, done, os.getpid()), daemon=True
        )
        for part in range(jobs)
    ]
    try:
        for child in children:
            child.start()
        for child in children:
            child.join(max(0.0, until - time.monotonic()))
    finally:
        for child in children:
            child.kill()
    print(f"{sum(done)} of {len(tasks)} sizes are compiled", flush=True)
    return [task for task, is_there in zip(tasks, done, strict=True) if is_there]


def _compile(
    tasks: Sequence[Any], compile_one: Callable[[Any], object], part: int, parts: int, done: Any, parent: int
) -> None:
    """Compile every `parts`-th task by a call; `done` tells which are."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it has ended before that
        return
    for i in range(part, len(tasks), parts):
        with contextlib.suppress(RuntimeError, TritonError):  # too large for the GPU
            compile_one(tasks[i])
            torch.cuda.synchronize()
            done[i] = 1
