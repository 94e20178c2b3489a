"""A signal to stop: the step is finished and saved first, and all processes stop after the same step."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from snaketron.jobs.launch import STOP_SIGNALS, is_rank
from snaketron.model import backend

import torch


class Stopped(Exception):
    """A signal asked the training to stop; its state is saved."""

    def __init__(self, iteration: int, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after step {iteration}")


class Stopping:
    """The signals that the processes of a training have received. All ranks call the same methods."""

    def __init__(self) -> None:
        self.received = 0  # of this process alone
        self.agreed = 0  # that of any process, the same in all of them

    def agree(self) -> None:
        """Learn of signals that reached other ranks.

        Signals reach ranks at other moments. What one has received by now, all of them stop for after this
        step; for what comes later, after the next.
        """
        self.agreed = any_rank(self.received)

    def is_told(self) -> bool:
        """Whether any rank has received a signal by now; all of them ask at the same time."""
        self.agreed = self.agreed or any_rank(self.received)
        return bool(self.agreed)

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Note a signal instead of dying: the step is finished and saved. A second one ends the process.

        A process that fails notes it until it ends: srun sends one when another has died, and this one has
        to say what it saw, without a status of its own that hides the other's.
        """

        def note(number: int, _frame: Any) -> None:
            self.received = number
            signal.signal(number, signal.SIG_DFL)

        previous = {number: signal.signal(number, note) for number in STOP_SIGNALS}
        failed = is_rank()
        try:
            yield
            failed = False
        except Stopped:
            failed = False
            raise
        finally:
            for number, handler in () if failed else previous.items():
                signal.signal(number, handler)


def any_rank(number: int) -> int:
    """The largest number that any rank gives."""
    found = torch.tensor(int(number), device=backend.device())
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return int(found)
