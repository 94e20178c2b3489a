"""How far a training is, in a file: for its supervisor, which notices silence, and for status.py."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from snaketron.files import read_json, write_json
from snaketron.jobs import places
from snaketron.log import UserError

INTERVAL_S = 1.0  # a file system may serve thousands of trainings


@dataclass
class Beat:
    """How far a training is."""

    iteration: int
    train_iters: int
    loss: float | None = None
    tokens_per_second: float | None = None


class Heartbeat:
    """Writes how far a training is to `path`, on the rank that writes metrics; the others only note it."""

    def __init__(self, path: Path, total: int, *, writer: bool) -> None:
        self.path, self.writer = path, writer
        self.now = Beat(0, total)
        self.written = -INTERVAL_S

    def beat(
        self, iteration: int, *, loss: float | None = None, tokens_per_second: float | None = None
    ) -> None:
        """Say that `iteration` steps are done; None leaves the loss or the speed of an earlier call."""
        places.has_done(iteration)
        if not self.writer:
            return
        before = self.now
        self.now = Beat(
            iteration,
            before.train_iters,
            before.loss if loss is None else loss,
            before.tokens_per_second if tokens_per_second is None else tokens_per_second,
        )
        self._write(at_once=iteration == self.now.train_iters)

    def alive(self) -> None:
        """Say again how far it is: what comes after the last step takes long, and goes on."""
        if self.writer:
            self._write(at_once=False)

    def _write(self, *, at_once: bool) -> None:
        now = time.monotonic()
        if at_once or now - self.written >= INTERVAL_S:
            said = {key: value for key, value in asdict(self.now).items() if value is not None}
            write_json(self.path, said)
            self.written = now


def touch(path: Path) -> None:
    """Say that a training is at work behind its last step, where it has said something before."""
    with contextlib.suppress(FileNotFoundError):
        os.utime(path)


def read(path: Path) -> Beat | None:
    """The last word of a training; None before its first, and while it is started again.

    Raises `UserError` where the file holds something else.
    """
    try:
        said = read_json(path)
        return Beat(said["iteration"], said["train_iters"], said.get("loss"), said.get("tokens_per_second"))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path}: does not say how far a training is; delete it") from None


def sentence(beat: Beat) -> str:
    """The progress of a training in words, as on its terminal.

    >>> sentence(Beat(20, 100, loss=5.25, tokens_per_second=3343.0))
    'step 20/100  loss 5.2500  3,343 tokens/s'
    """
    parts = [f"step {beat.iteration}/{beat.train_iters}"]
    if beat.loss is not None:
        parts.append(f"loss {beat.loss:.4f}")
    if beat.tokens_per_second:
        parts.append(f"{beat.tokens_per_second:,.0f} tokens/s")
    return "  ".join(parts)
