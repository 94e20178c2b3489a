"""The initial weights: their distributions, and what they depend on."""

from __future__ import annotations

import math

from snaketron.config import Model, Parallel
from snaketron.model.initial import draw, initialize_weights
from snaketron.model.spec import build_model, transformer_config

import pytest
import torch

MODEL = Model(hybrid_layer_pattern="MEM*EME", init_method_std=0.02)


def build(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(torch.seed())  # what megatron-core draws is of no account
    config = transformer_config(MODEL, Parallel())
    model = build_model(config, MODEL, Parallel(), 2048, 64)
    initialize_weights(model, config, seed)
    return {name: p.detach() for name, p in model.named_parameters()}


def test_the_seed_alone_decides():
    once, again, other = build(1), build(1), build(2)
    assert all(torch.equal(once[name], again[name]) for name in once)
    random = [name for name in once if not torch.equal(once[name], other[name])]
    constant = {name.rsplit(".", 2)[-1] for name in once if name not in random}
    assert constant == {"weight", "layer_norm_weight", "D"}  # norms at 1 and the skip connection of Mamba-2
    assert all("norm" in name or name.endswith(".D") for name in once if name not in random)


def test_every_tensor_has_numbers_of_its_own():
    """Not the same ones again in each layer or expert."""
    weights = build(1)
    experts = [p.flatten()[0].item() for name, p in weights.items() if "local_experts" in name]
    assert len(set(experts)) == len(experts) > 16


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("embedding.word_embeddings.weight", 0.02),
        ("decoder.layers.0.mixer.in_proj.weight", 0.02),
        ("decoder.layers.0.mixer.out_proj.weight", 0.02 / math.sqrt(7)),  # 7 layers
        ("decoder.layers.3.self_attention.linear_proj.weight", 0.02 / math.sqrt(7)),
        ("decoder.layers.1.mlp.experts.local_experts.5.linear_fc1.weight", 0.02),
        ("decoder.layers.1.mlp.experts.local_experts.5.linear_fc2.weight", 0.02 / math.sqrt(7)),
        ("decoder.layers.1.mlp.shared_experts.linear_fc2.weight", 0.02 / math.sqrt(7)),
        ("decoder.layers.1.mlp.fc2_latent_proj.weight", 0.02 / math.sqrt(7)),
        ("output_layer.weight", 0.02),
    ],
)
def test_spread_is_that_of_megatron_core(name: str, std: float):
    """megatron-core's own first weights, before they are drawn anew, have the same spread."""
    config = transformer_config(MODEL, Parallel())
    model = build_model(config, MODEL, Parallel(), 2048, 64)
    theirs = dict(model.named_parameters())[name].std().item()
    ours = build(1)[name].std().item()
    assert ours == pytest.approx(std, rel=0.05) and theirs == pytest.approx(std, rel=0.05)


def test_mamba_starts_in_its_ranges():
    generator, config = torch.Generator().manual_seed(1), transformer_config(MODEL, Parallel())
    decay = draw("decoder.layers.0.mixer.A_log", (4096,), config, generator).exp()
    assert 1 <= decay.min() < 1.1 and 15.9 < decay.max() <= 16
    step = torch.nn.functional.softplus(draw("decoder.layers.0.mixer.dt_bias", (4096,), config, generator))
    assert 0.00099 < step.min() < 0.0011 and 0.09 < step.max() < 0.1001
    assert step.log().mean().item() == pytest.approx(math.log(0.01), abs=0.1)  # log-uniform
    conv = draw("decoder.layers.0.mixer.conv1d.weight.x", (256, 1, 4), config, generator)
    assert conv.abs().max() <= 0.5 and conv.std().item() == pytest.approx(0.5 / math.sqrt(3), rel=0.05)
