"""What a training that a run is asked for will do: train, continue, or only be published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from snaketron.wording import large, short_duration


@dataclass(frozen=True)
class Inputs:
    """What a training is made from, as far as it can be known before it starts."""

    identities: Sequence[str]  # in the order of the version key; that of the blend is the first
    blend: Mapping[str, Any] | None = None  # the content of blend.json, where it follows from the length


@dataclass(frozen=True)
class Progress:
    """How far a training is that was or was not begun."""

    identity: str | None = None  # its stage and version key; None where its inputs are still to be made
    done: int = 0  # steps that its last checkpoint holds
    finished: bool = False
    tokens_per_second: float | None = None  # of all processes, measured when the stage was trained last
    origin: str = ""  # the shorter version whose last checkpoint, after `done` steps, it goes on from
    starts_over: str = ""  # why it does not go on from the version that is published
    published: bool = False  # a version is, and whether it is this one is not known before its inputs are


@dataclass(frozen=True)
class Planned:
    """What a training will do, in numbers."""

    steps: int = 0  # 0 where nothing is trained
    done: int = 0  # steps that are not trained again
    tokens: int = 0  # to be trained
    seconds: float | None = None  # for these; None where nobody knows the speed


def planned(progress: Progress, steps: int, tokens_per_step: int, stated: float | None) -> Planned:
    """What a training will do; arguments are those of `outlook`."""
    if progress.finished:
        return Planned()
    left = (steps - progress.done) * tokens_per_step
    speed = stated or progress.tokens_per_second
    return Planned(steps, progress.done, left, left / speed if speed else None)


def outlook(progress: Progress, steps: int, tokens_per_step: int, stated: float | None) -> str:
    """What a training will do, in words.

    Args:
        progress: how far it is.
        steps: of the whole training.
        tokens_per_step: over all processes.
        stated: tokens a second of all processes, from the configuration; None where that says nothing.

    >>> outlook(Progress(done=20), 80, 1000, 100.0)
    'continues after step 20 of 80, about 10.0 min'
    """
    if progress.finished:
        return "was trained before and is only published"
    plan = planned(progress, steps, tokens_per_step, stated)
    text = f"trains {steps:,} steps, {large(plan.tokens)} tokens"
    if progress.origin:
        text = f"continues at step {progress.done:,} of {steps:,}, from {progress.origin}"
    elif progress.done:
        text = f"continues after step {progress.done:,} of {steps:,}"
    if plan.seconds is not None:
        text += f", about {short_duration(plan.seconds)}"
        text += "" if stated else " at the speed of the last time"
    if not progress.identity and not progress.done:
        text += ", once what it is made from is there"
    if progress.starts_over:
        return f"{text}; starts over: {progress.starts_over}"
    return f"{text}; starts over unless that is as before" if progress.published else text
