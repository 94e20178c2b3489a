"""Which checkpoints of a training are kept: the newest ones, and those from before its learning rate falls.

A killed training continues from the newest. From those before the rate falls it can be made longer, and they
can be averaged (`train.averaging`).
"""

from __future__ import annotations

from collections.abc import Iterable

from snaketron.config import Run


def is_steady(iteration: int, run: Run, steady: int) -> bool:
    """Whether the checkpoint after so many steps is one of those from before the learning rate falls.

    They lie `steady_interval` steps apart, and the last one is where it begins to fall, after `steady` steps.
    """
    if not run.keep_steady or not 0 < iteration <= steady:
        return False
    return iteration == steady or iteration % (run.steady_interval or run.save_interval) == 0


def kept(iterations: Iterable[int], run: Run, steady: int) -> set[int]:
    """The steps whose checkpoints are kept, out of all that have one."""
    there = sorted(iterations)
    before = [iteration for iteration in there if is_steady(iteration, run, steady)]
    return {*there[-run.keep_checkpoints :], *(before[-run.keep_steady :] if run.keep_steady else ())}


def kept_at_end(run: Run, steady: int, steps: int) -> set[int]:
    """The steps whose checkpoints a training leaves; a plan may ask that of trillions of steps."""
    interval, most = run.steady_interval or run.save_interval, run.keep_checkpoints + run.keep_steady
    newest = range(run.save_interval, steps, run.save_interval)[-most:]
    before = {*range(interval, steady, interval)[-most:], steady} if run.keep_steady else set()
    return kept({*newest, *before, steps} - {0}, run, steady)
