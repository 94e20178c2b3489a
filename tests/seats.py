"""GPUs that trainings of tests and benchmarks share."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path


class Seats:
    """The GPUs, each with so many seats for trainings."""

    def __init__(self, gpus: int, each: int) -> None:
        self.free = dict.fromkeys(range(gpus), each)
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def taken(self, count: int) -> Iterator[list[int]]:
        """The GPUs that have the most free seats, once `count` of them, at most all, have one."""
        gpus = self.take(count)
        try:
            yield gpus
        finally:
            self.give_back(gpus)

    def take(self, count: int) -> list[int]:
        count = min(count, len(self.free))
        with self.changed:
            self.changed.wait_for(lambda: sum(seats > 0 for seats in self.free.values()) >= count)
            taken = sorted(sorted(self.free, key=lambda gpu: -self.free[gpu])[:count])
            for gpu in taken:
                self.free[gpu] -= 1
            return taken

    def give_back(self, gpus: list[int]) -> None:
        with self.changed:
            for gpu in gpus:
                self.free[gpu] += 1
            self.changed.notify_all()


def shared(processes: int, gpus: int) -> dict[str, str]:
    """What the environment of a training lacks whose processes share one GPU; nothing if each has its own."""
    if gpus != 1 or processes <= 1:
        return {}
    first = str(Path(__file__).parent / "gpu/shared")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (first, os.environ.get("PYTHONPATH"))))}
