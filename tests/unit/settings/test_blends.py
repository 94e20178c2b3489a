"""What blends are told."""

from __future__ import annotations

import math

from snaketron.settings.blends import BlendSettings

import pytest
from pydantic import ValidationError


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf])
def test_a_weight_is_a_positive_number(weight: float):
    with pytest.raises(ValidationError, match=r"weights\.docs"):
        BlendSettings(weights={"docs": weight})
