"""The learning rate of each step, and how long two schedules agree.

A training that is made longer goes on from a step up to which the longer one has the same learning rates.
"""

from __future__ import annotations

import math
from typing import Literal

from snaketron.config import Optimizer, Section


class Schedule(Section):
    """The learning rate over tokens in pretraining and over steps in SFT; a step counts `increment` of them.

    It rises linearly over the first `warmup` units. WSD then stays and falls over the last `decay` units
    before `end` by 1 - sqrt; cosine falls from the warm-up to `end`; constant stays.
    """

    style: Literal["WSD", "cosine", "constant"]
    start: int
    warmup: int
    end: int
    decay: int
    increment: int


def learning_rate(schedule: Schedule, optimizer: Optimizer, iteration: int) -> float:
    """The rate of the step that follows `iteration` steps, as megatron-core's scheduler computes it.

    WSD falls as min + (max - min) (1 - sqrt(d)) and cosine as min + (max - min) (cos(pi d) + 1) / 2, where d
    is the share of the decay that has passed.
    """
    most, least = optimizer.learning_rate, optimizer.min_learning_rate
    now = schedule.start + iteration * schedule.increment
    if schedule.warmup and now <= schedule.warmup:
        return most * now / schedule.warmup
    if schedule.style == "constant":
        return most
    if now > schedule.end:
        return least
    first = schedule.end - schedule.decay if schedule.style == "WSD" else schedule.warmup
    if now <= first:
        return most
    share = (now - first) / (schedule.end - first)
    left = 1 - math.sqrt(share) if schedule.style == "WSD" else (math.cos(math.pi * share) + 1) / 2
    return least + left * (most - least)


def steady_steps(schedule: Schedule, optimizer: Optimizer, steps: int) -> int:
    """How many of the first steps come before the rate falls; all where it does not fall within `steps`.

    A cosine falls from its warm-up on, which is not worth a checkpoint: none.
    """
    if schedule.style == "constant" or optimizer.learning_rate == optimizer.min_learning_rate:
        return steps
    if schedule.style == "cosine":
        return 0
    first = schedule.end - schedule.decay
    return max(0, min(steps, math.ceil((first - schedule.start) / schedule.increment)))


def same_steps(one: tuple[Schedule, Optimizer, int], other: tuple[Schedule, Optimizer, int]) -> int:
    """How many of their first steps two trainings do at the same learning rates, to the bit.

    Each is a schedule, an optimizer and the number of steps. What they share is the warm-up and what follows
    it until the rate of one falls; or everything, where the rates fall alike.
    """
    (a, of_a, steps_a), (b, of_b, steps_b) = one, other
    least, steps = (of_a.min_learning_rate, of_b.min_learning_rate), min(steps_a, steps_b)
    rise = [(s.style, s.start, s.warmup, s.increment) for s in (a, b)]
    if rise[0] != rise[1] or least[0] != least[1] or of_a.learning_rate != of_b.learning_rate:
        return 0
    if (a.end, a.decay) == (b.end, b.decay):
        return steps
    return min(steady_steps(a, of_a, steps), steady_steps(b, of_b, steps))
