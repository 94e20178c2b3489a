"""The weights of a blend on a command line."""

from __future__ import annotations

from snaketron.log import UserError
from snaketron.settings.weights import parse_weights, weight_options

import pytest


def test_weights_are_read_back_as_they_were_written():
    weights = {"docs": 0.1, "web": 1e-07, "code": 3}
    assert weight_options(weights) == ["docs=0.1", "web=1e-07", "code=3"]
    assert parse_weights(weight_options(weights)) == weights


@pytest.mark.parametrize("option", ["docs", "docs=", "docs=0", "docs=-1", "=1", "docs=nan", "docs=inf"])
def test_a_wrong_weight_is_an_error(option):
    with pytest.raises(UserError) as refused:
        parse_weights(["code=1", option])
    assert str(refused.value) == f"--weights {option}: give NAME=WEIGHT with a weight above 0"


def test_a_name_that_is_given_twice_is_an_error():
    with pytest.raises(UserError) as refused:
        parse_weights(["docs=1", "docs=2"])
    assert str(refused.value) == "--weights docs=2: 'docs' is given twice; add the two weights up"
