"""What blends are told."""

from __future__ import annotations

import json
import math

from snaketron.config import load
from snaketron.settings.blends import BlendSettings, phase_settings
from snaketron.settings.chats import render_settings
from snaketron.settings.text import tokenize_settings

import pytest
from pydantic import ValidationError


@pytest.mark.parametrize("weight", [0, -1, math.nan, math.inf])
def test_a_weight_is_a_positive_number(weight: float):
    with pytest.raises(ValidationError, match=r"weights\.docs"):
        BlendSettings(weights={"docs": weight})


def test_a_source_that_is_held_out_has_its_weight_beside_those_that_are_trained():
    """So the shares of the others are the same with it and without it."""
    corpora = [{"name": name, "paths": [f"{name}.jsonl"]} for name in ("docs", "code")]
    phase = {"name": "all", "tokens": 300_000}
    blend = [{"corpus": "docs", "weight": 3}, {"corpus": "code", "weight": 3}]
    mine = {"name": "mine", "paths": ["mine.jsonl"], "split": "valid"}
    without = load({"corpora": corpora, "pretrain": {"phases": [phase | {"blend": blend}]}}, {})
    blend += [{"corpus": "mine", "weight": 6}]
    held_out = load({"corpora": [*corpora, mine], "pretrain": {"phases": [phase | {"blend": blend}]}}, {})
    before, now = (json.loads(phase_settings(c, "all").model_dump_json()) for c in (without, held_out))
    assert (before["weights"], "splits" in before) == ({"docs": 0.5, "code": 0.5}, False)
    assert now == before | {"weights": before["weights"] | {"mine": 1.0}, "splits": {"mine": "valid"}}


def test_the_split_of_a_source_is_told_where_it_has_one_and_fractions_have_no_part_in_it():
    for key, told in (("corpora", tokenize_settings), ("chats", render_settings)):
        source = load({}, {}).model_dump()[key]
        config = load({key: [source[0] | {"split": "valid"}, *source[1:]]}, {})
        first, second = (json.loads(told(config, one).model_dump_json()) for one in getattr(config, key)[:2])
        assert (first["split"], first["valid_fraction"], first["test_fraction"]) == ("valid", 0, 0)
        assert "split" not in second and second["valid_fraction"] > 0
