"""How far a training is, in a file: for its supervisor, which notices silence, and for status.py."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from snaketron.files import read_json, write_json

FILE = "progress.json"
INTERVAL_S = 1.0  # no more often: a file system may serve thousands of processes


class Heartbeat:
    """Writes the progress of a training, on the rank that writes metrics; nothing on the others."""

    def __init__(self, directory: Path, total: int, *, writer: bool) -> None:
        self.path, self.total, self.writer = directory / FILE, total, writer
        self.values: dict[str, Any] = {}
        self.written = -INTERVAL_S

    def beat(self, iteration: int, **values: Any) -> None:
        """Say that `iteration` steps are done; `values` of earlier calls stay."""
        if not self.writer:
            return
        self.values |= {"iteration": iteration, "train_iters": self.total, **values}
        now = time.monotonic()
        if now - self.written >= INTERVAL_S or iteration == self.total:
            write_json(self.path, self.values)
            self.written = now


def read(directory: Path) -> dict[str, Any]:
    """The last word of the training in `directory`; empty when there is none."""
    try:
        return read_json(directory / FILE)
    except FileNotFoundError:  # not begun, or just about to begin again
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
