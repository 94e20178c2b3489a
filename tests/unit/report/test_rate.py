"""The learning rate of the curriculum, before any step."""

from __future__ import annotations

from pathlib import Path

from snaketron.config import load
from snaketron.report.rate import draw, rates

import pytest
import yaml


def test_the_rate_of_super_rises_stays_falls_and_stays():
    """200 B tokens up to 4.5e-4, and 5 T down to 4.5e-6 by 1 - sqrt: half of them leave 0.293 of it."""
    config = load(yaml.safe_load((Path(__file__).parents[3] / "config/super.yaml").read_text()), {})
    broad, focused, *long = rates(config)
    assert broad.points[0] == (0, 0) and broad.points[-1][1] == 4.5e-4
    assert all(rate == 4.5e-4 for tokens, rate in broad.points if tokens > 201e9)
    tokens, rate = focused.points[len(focused.points) // 2]
    assert tokens == pytest.approx(22.5e12, rel=1e-3)
    assert rate == pytest.approx(4.5e-6 + 4.455e-4 * (1 - 0.5**0.5), rel=2e-3)
    assert focused.points[-1][1] == pytest.approx(4.5e-6, rel=1e-3)
    assert {rate for phase in long for _, rate in phase.points} == {4.5e-6}
    assert long[-1].points[-1][0] == pytest.approx(25.051e12, rel=1e-4)
    picture = draw(config)
    assert picture.startswith(b"<?xml") and picture == draw(config)
