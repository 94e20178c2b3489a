"""The weights of a blend as the command line of its job has them: `docs=0.5 code=1.5`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from snaketron.log import UserError


def weight_options(weights: Mapping[str, float]) -> list[str]:
    """What follows `--weights`: one word for each corpus or source of conversations."""
    return [f"{name}={weight}" for name, weight in weights.items()]


def parse_weights(options: Iterable[str]) -> dict[str, float]:
    """Weights by name, from `weight_options`; they need not sum to 1. Raises `UserError`."""
    weights: dict[str, float] = {}
    for option in options:
        name, _, number = option.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or not 0 < weight < math.inf:
            raise UserError(f"--weights {option}: give NAME=WEIGHT with a weight above 0")
        if name in weights:
            raise UserError(f"--weights {option}: {name!r} is given twice; add the two weights up")
        weights[name] = weight
    return weights
