"""Floating-point operations of a token, counted by hand."""

from snaketron.sizes import flops
from tests.unit.sizes.models import HAND

import pytest


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        # in_proj 10 -> z 8, x 8, B 5, C 5, dt 2; out_proj 8 -> 10; state of 8 x 5 numbers
        ("M", 2 * (10 * 28 + 8 * 10) + 7 * 8 * 5),
        # query 12, key 6, value 6; output 12 -> 10; 50 of 100 keys, two products of width 12
        ("*", 2 * (10 * 24 + 12 * 10) + 2 * 2 * 12 * 50),
        ("-", 2 * (10 * 7 + 7 * 10)),
        # router to 6, latent 10 -> 8 -> 10, two experts 8 -> 9 -> 8, shared 10 -> 11 -> 10
        ("E", 2 * (10 * 6 + 2 * 10 * 8 + 2 * 2 * 8 * 9 + 2 * 10 * 11)),
    ],
)
def test_flops_of_a_layer_by_hand(layer, expected):
    assert flops.layer_flops(HAND, layer, 100) == expected


def test_flops_of_training_by_hand():
    # Two layers, an output layer of 32 rows, and twice: the joining projection 20 -> 10, a layer, the output.
    model = HAND.model_copy(
        update={"hybrid_layer_pattern": "M-", "mtp_hybrid_layer_pattern": "-", "mtp_num_layers": 2}
    )
    mamba, mlp, output = 2 * (10 * 28 + 8 * 10) + 7 * 8 * 5, 280, 2 * 10 * 32
    forward = mamba + mlp + output + 2 * (2 * 20 * 10 + mlp + output)
    assert flops.training_flops(model, 30, 100) == 3 * forward
