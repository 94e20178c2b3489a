"""Tokens a second, as stated or estimated, and as others measured them on that GPU."""

from __future__ import annotations

from typing import Any

from snaketron.config import load
from snaketron.sizes.flops import training_flops
from snaketron.sizes.gpus import in_nodes
from snaketron.sizes.plan import estimate
from snaketron.sizes.search import measure
from snaketron.sizes.speed import ESTIMATED, flops_per_token, published, speed

import pytest

H100 = {"gpus_per_node": 1, "gpu": "h100"}


def of(name: str, what: Any = published, **values: Any):
    config = load(values, {})
    return what(config, config.training(name))


def test_a_training_is_as_fast_as_its_step_is_estimated_and_the_search_says():
    config = load({"cluster": H100, "sft": {"recompute": ["layer"]}}, {})
    for training in config.trainings():
        found = speed(config, training)
        assert found is not None and found.source == ESTIMATED
        step = measure(config, training, in_nodes("h100", config.cluster))
        assert found.tokens_per_second == pytest.approx(step.tokens_per_second)
        hours = training.tokens / found.tokens_per_second / 3600
        assert estimate(config, training).hours == pytest.approx(hours)


def test_published_speeds_are_those_of_the_same_gpu():
    """236.3 TFLOP/s on an H100, and 542 on a B200, over the model FLOPs of a token."""
    config = load({"cluster": H100}, {})
    flops = training_flops(config.model, 2048, 256)
    found = of("pretrain/broad", cluster=H100)
    assert found.tokens_per_second == pytest.approx(236.3e12 / flops)
    assert found.source.startswith("236.3 TFLOP/s as Super in bf16 on 64 H100, ")
    faster = of("pretrain/broad", cluster=H100 | {"gpu": "b200"})
    assert faster.tokens_per_second == pytest.approx(542e12 / flops)


def test_what_is_stated_counts_more():
    assert of("sft", speed, cluster=H100, sft={"tokens_per_second_per_gpu": 7.0}) == (7.0, "stated")


@pytest.mark.parametrize("cluster", [{}, {"gpus_per_node": 8}, {"gpu": "h100"}])
def test_without_a_known_gpu_nothing_is_estimated(cluster: dict[str, Any]):
    assert of("sft", speed, cluster=cluster) is None
    assert of("sft", published, cluster=cluster) is None


def test_layers_that_are_computed_again_cost_a_third_more():
    once = of("sft", cluster=H100).tokens_per_second
    again = of("sft", cluster=H100, sft={"recompute": ["layer"]}).tokens_per_second
    assert again == pytest.approx(once * 3 / 4)


def test_frozen_weights_have_no_gradient():
    config = load({}, {})
    full, adapters = (flops_per_token(config, config.training(name)) for name in ("sft", "lora"))
    assert adapters == pytest.approx(full * 2 / 3)
