"""The learning rate over all phases of pretraining, as the configuration says it, before any step."""

from __future__ import annotations

from typing import NamedTuple

from snaketron.config import Config
from snaketron.report.figures import draw_rate
from snaketron.settings.schedule import learning_rate
from snaketron.settings.training import train_settings

POINTS = 400  # of each phase


class PhaseRate(NamedTuple):
    """The learning rate of a phase: tokens before a step, over all phases, and the rate of the step."""

    phase: str
    points: list[tuple[float, float]]


def rates(config: Config) -> list[PhaseRate]:
    """The rates of all phases, in order; the first and the last step of each are among the points."""
    found, before = [], 0
    for training in config.trainings():
        if training.section != "pretrain":
            continue
        settings = train_settings(config, training.name)
        last = training.train_iters - 1
        steps = sorted({round(last * i / POINTS) for i in range(POINTS + 1)})
        of_step = training.global_batch_size * training.seq_length
        points = [
            (float(before + step * of_step), learning_rate(settings.schedule, settings.optimizer, step))
            for step in steps
        ]
        found.append(PhaseRate(training.phase, points))
        before += training.tokens
    return found


def draw(config: Config) -> bytes:
    """The figure, as SVG: all phases, and beside them those with a rate of their own, which are short."""
    found = rates(config)
    constant = {training.phase for training in config.trainings() if training.constant_rate}
    return draw_rate(found, [one for one in found if one.phase in constant])
