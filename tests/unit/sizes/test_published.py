"""What was published or measured, and what is worked out for it."""

from __future__ import annotations

from pathlib import Path

from snaketron.config import load
from snaketron.sizes.published import compare

import pytest
import yaml

SUPER = yaml.safe_load((Path(__file__).parents[3] / "config/super.yaml").read_text())


@pytest.mark.parametrize("number", compare(load(SUPER, {})), ids=lambda number: number.what)
def test_estimates_agree_with_what_was_published(number):
    assert number.estimate == pytest.approx(number.published, rel=number.tolerance, abs=0)


def test_the_parameters_are_those_of_the_checkpoint_to_the_last_one():
    first, *_ = compare(load(SUPER, {}))
    assert first.published == first.estimate == 123_611_012_096
