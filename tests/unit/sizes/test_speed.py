"""Tokens a second, from what is stated or was measured on that GPU."""

from __future__ import annotations

from typing import Any

from snaketron.config import load
from snaketron.sizes.flops import training_flops
from snaketron.sizes.speed import flops_per_token, speed

import pytest

H100 = {"gpus_per_node": 1, "gpu": "h100"}


def of(name: str, **values: Any):
    config = load(values, {})
    return speed(config, config.training(name))


def test_a_gpu_is_as_fast_as_it_was_measured_and_no_other_is():
    """236.3 TFLOP/s on an H100, and 542 on a B200, over the model FLOPs of a token."""
    config = load({"cluster": H100}, {})
    flops = training_flops(config.model, 2048, 256)
    found = of("pretrain/broad", cluster=H100)
    assert found.tokens_per_second == pytest.approx(236.3e12 / flops)
    assert found.source.startswith("236.3 TFLOP/s as Super in bf16 on 64 H100, ")
    faster = of("pretrain/broad", cluster=H100 | {"gpu": "b200"})
    assert faster.tokens_per_second == pytest.approx(542e12 / flops)


def test_what_is_stated_counts_more():
    assert of("sft", cluster=H100, sft={"tokens_per_second_per_gpu": 7.0}) == (7.0, "stated")


@pytest.mark.parametrize("cluster", [{}, {"gpus_per_node": 8}, {"gpu": "h100"}])
def test_without_a_known_gpu_nothing_is_estimated(cluster: dict[str, Any]):
    assert of("sft", cluster=cluster) is None


def test_layers_that_are_computed_again_cost_a_third_more():
    once = of("sft", cluster=H100).tokens_per_second
    again = of("sft", cluster=H100, sft={"recompute": ["layer"]}).tokens_per_second
    assert again == pytest.approx(once * 3 / 4)


def test_frozen_weights_have_no_gradient():
    config = load({}, {})
    full, adapters = (flops_per_token(config, config.training(name)) for name in ("sft", "lora"))
    assert adapters == pytest.approx(full * 2 / 3)
