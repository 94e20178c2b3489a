"""How far a training is, in a file: for its supervisor, which notices silence, and for status.py."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from snaketron.files import read_json, write_json

INTERVAL_S = 1.0  # a file system may serve thousands of trainings


class Heartbeat:
    """Writes how far a training is to `path`, on the rank that writes metrics; nothing on the others."""

    def __init__(self, path: Path, total: int, *, writer: bool) -> None:
        self.path, self.total, self.writer = path, total, writer
        self.values: dict[str, Any] = {}
        self.written = -INTERVAL_S

    def beat(self, iteration: int, **values: Any) -> None:
        """Say that `iteration` steps are done. `values` are added to those of earlier calls."""
        if not self.writer:
            return
        self.values |= {"iteration": iteration, "train_iters": self.total, **values}
        now = time.monotonic()
        if now - self.written >= INTERVAL_S or iteration == self.total:
            write_json(self.path, self.values)
            self.written = now


def read(path: Path) -> dict[str, Any]:
    """The last word of a training; empty before its first, and while it is started again."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return {}


def sentence(values: dict[str, Any]) -> str:
    """The progress of a training in words, as on its terminal.

    >>> sentence({"iteration": 20, "train_iters": 100, "loss": 5.25, "tokens_per_second": 3343.0})
    'step 20/100  loss 5.2500  3,343 tokens/s'
    """
    parts = [f"step {values['iteration']}/{values['train_iters']}"]
    if (loss := values.get("loss")) is not None:
        parts.append(f"loss {loss:.4f}")
    if speed := values.get("tokens_per_second"):
        parts.append(f"{speed:,.0f} tokens/s")
    return "  ".join(parts)
