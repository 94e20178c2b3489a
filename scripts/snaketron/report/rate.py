"""The learning rate over all phases of pretraining, as the configuration says it, before any step."""

from __future__ import annotations

from typing import NamedTuple

from snaketron.config import Config
from snaketron.report.figures import COLOURS, as_svg, drawing
from snaketron.settings.schedule import learning_rate
from snaketron.settings.training import train_settings
from snaketron.wording import short

from matplotlib.ticker import FuncFormatter, MaxNLocator

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
    phases = rates(config)
    constant = {training.phase for training in config.trainings() if training.constant_rate}
    closer = [one for one in phases if one.phase in constant]
    colours = {one.phase: COLOURS[i % len(COLOURS)] for i, one in enumerate(phases)}
    with drawing(3.0) as figure:
        widths = [2, 1] if closer else [2]
        panels = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
        for axes, shown in zip(panels, (phases, closer), strict=False):
            first = shown[0].points[0][0]
            for i, one in enumerate(shown):
                tokens = [at - first for at, _ in one.points]
                look = {"color": colours[one.phase], "label": one.phase if shown is phases else None}
                axes.plot(tokens, [rate for _, rate in one.points], linewidth=1.6, **look)
                shade = {"color": colours[one.phase], "alpha": 0.06 + 0.04 * (i % 2), "linewidth": 0}
                axes.axvspan(tokens[0], tokens[-1], **shade)
            axes.set_xlabel(f"tokens after {short(first)}" if first else "tokens")
            axes.set_yscale("log")
            axes.xaxis.set_major_locator(MaxNLocator(6 if shown is phases else 3))
            axes.xaxis.set_major_formatter(FuncFormatter(short))
            axes.grid(axis="both")
        panels[0].set_ylabel("learning rate (logarithmic)")
        figure.legend(loc="outside upper left", ncols=4, handletextpad=0.4)
        return as_svg(figure)
