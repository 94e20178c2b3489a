"""What was published or measured, and what is worked out for it."""

from __future__ import annotations

from pathlib import Path

from snaketron.config import load
from snaketron.sizes.published import compare

import pytest
import yaml

CONFIG = Path(__file__).parents[3] / "config"
BOTH = [load(yaml.safe_load((CONFIG / f"{name}.yaml").read_text()), {}) for name in ("super", "nano")]


@pytest.mark.parametrize("number", compare(*BOTH), ids=lambda number: number.what)
def test_estimates_agree_with_what_was_published(number):
    assert number.estimate == pytest.approx(number.published, rel=number.tolerance, abs=0)


def test_the_parameters_are_those_of_the_checkpoint_to_the_last_one():
    first, *_ = compare(*BOTH)
    assert first.published == first.estimate == 123_611_012_096
