"""Measurements one after the other on the same GPUs.

The processes of each start (import) while the one before measures, and wait for `GO` on their standard input
before they use a GPU.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

GO = b"go\n"


@dataclass(frozen=True)
class Turn:
    """One measurement: a command of Python's, of as many processes as it has GPUs."""

    name: str
    command: Sequence[str]
    read: Callable[[str], dict[str, Any]]  # its result, from what it printed; ValueError: there is none
    gpus: int = 1
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, out: Path) -> subprocess.Popen[bytes]:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.gpus)]
        with (out / f"{self.name}.log").open("w") as log:
            return subprocess.Popen(
                [sys.executable, *(torchrun if self.gpus > 1 else []), *self.command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | self.environment,
            )


def wait_for_turn() -> None:
    """Wait until the measurements before are over."""
    os.read(sys.stdin.fileno(), len(GO))  # no more: the processes of one share their input


def take(
    turns: Sequence[Turn], out: Path, seconds: float, *, first: float = 260, each: float = 150
) -> Iterator[tuple[Turn, dict[str, Any]]]:
    """Each turn with its result, as they come; one that fails is told with the end of its log.

    Args:
        turns: in their order.
        out: directory of logs.
        seconds: for all of them together; one that has less time left is ended after 5 seconds.
        first, each: the longest time of the first one, which tunes kernels, and of each other, in seconds.
    """
    began = time.monotonic()
    running = [turns[0].start(out)] if turns else []
    try:
        for i, turn in enumerate(turns):
            if i + 1 < len(turns):
                running.append(turns[i + 1].start(out))
            left = min(each if i else first, max(5.0, seconds - (time.monotonic() - began)))
            text = ""
            try:
                text = running[i].communicate(GO * turn.gpus, timeout=left)[0].decode(errors="replace")
                yield turn, turn.read(text)
            except (subprocess.TimeoutExpired, ValueError):
                kill(running[i])
                log = (out / f"{turn.name}.log").read_text(errors="replace")
                said = (text + log)[-1500:]
                print(f"{time.monotonic() - began:.0f} s {turn.name} failed: {said}", flush=True)
    finally:
        for process in running:
            kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill it with its processes, and wait until they are gone: until then they have their GPU's memory."""
    if process.poll() is None:
        one = psutil.Process(process.pid)
        started = [*one.children(recursive=True), one]
        for each in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()
        psutil.wait_procs(started, timeout=30)
