"""The numbers that training reads inside megatron-core, against what they say they are."""

from __future__ import annotations

from typing import Any

from snaketron.config import Model
from snaketron.model.megatron import internals

import pytest
import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter

EXPERTS, TOPK, LENGTH, BATCH = 8, 2, 40, 3


def loss_by_hand(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The load balancing loss of hidden states (length, batch, width), in float64.

    The mean over sequences of experts / (topk x tokens^2) x sum over experts of (tokens that chose the
    expert) x (sum over tokens of its share of the sigmoid scores): 1 where the load is even. Source:
    DeepSeek-V3 (arXiv 2412.19437), equations 17 to 20.
    """
    scores = (hidden.double() @ weight.double().T).sigmoid()  # the bias is still zero
    chosen = torch.zeros_like(scores).scatter_(-1, scores.topk(TOPK).indices, 1.0).sum(0)
    shares = (scores / scores.sum(-1, keepdim=True)).sum(0)
    return (chosen * shares).sum(-1).mean() * EXPERTS / (TOPK * len(hidden) ** 2)


def losses_of_layers(model: HybridModel, mask: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The losses of a batch, and for each router the mean over its calls of the loss by hand."""
    seen: dict[TopKRouter, list[torch.Tensor]] = {}

    def note(router: TopKRouter, arguments: tuple[torch.Tensor, ...], _output: object) -> None:
        seen.setdefault(router, []).append(loss_by_hand(arguments[0], router.weight))

    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.register_forward_hook(note)
    ids = torch.randint(0, 256, (BATCH, LENGTH))
    losses = model(ids, None, None, labels=ids, loss_mask=mask)
    return losses, [torch.stack(of_layer).mean() for of_layer in seen.values()]


@pytest.mark.parametrize(
    ("pattern", "mtp_pattern", "depths", "layers"),
    [
        ("E-M*", "M*", 2, 1),  # no routed layer in multi-token prediction
        ("E*", "EE", 2, 3),  # two of them, which both depths share
        ("EE", "*E", 2, 3),
        ("ME", "*E", 0, 1),
        ("M*", "*E", 1, 1),
        ("M*", "M*", 1, 0),
    ],
)
def test_the_load_balancing_loss_is_the_mean_over_routed_layers(build, pattern, mtp_pattern, depths, layers):
    keys = {"hybrid_layer_pattern": pattern, "mtp_hybrid_layer_pattern": mtp_pattern}
    keys |= {"mtp_num_layers": depths}
    model = build(**keys, init_method_std=0.3)  # so that the load is uneven, and each layer has another loss
    losses, seen = losses_of_layers(model, torch.ones(BATCH, LENGTH))
    losses.sum().backward()
    routed = Model(**keys).routed_layers
    assert routed == len(seen) == layers
    expected = float(torch.stack(seen).mean()) if seen else 0.0
    assert internals.take_router_loss(model.config, routed) == pytest.approx(expected, rel=1e-5)
    assert internals.take_router_loss(model.config, routed) == 0  # the tracker is empty again


@pytest.mark.parametrize("depths", [1, 3])
def test_a_layer_adds_its_load_balancing_loss_once_whatever_the_depths(build, monkeypatch, depths):
    """Nothing else has a gradient here; the step divides it by its tokens."""
    model = build(
        hybrid_layer_pattern="ME*",
        mtp_hybrid_layer_pattern="E*E",
        mtp_num_layers=depths,
        init_method_std=0.3,
        moe_aux_loss_coeff=0.01,
    )
    losses, seen = losses_of_layers(model, torch.zeros(1 + depths, BATCH, LENGTH))
    parameters = list(model.parameters())
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.tensor(0.0))
    expected = torch.autograd.grad(sum(seen), parameters, retain_graph=True, allow_unused=True)
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.tensor(1.0))
    (losses * 0).sum().backward()
    scale = max(float(gradient.abs().max()) for gradient in expected if gradient is not None)
    for parameter, gradient in zip(parameters, expected, strict=True):
        by_hand = torch.zeros_like(parameter) if gradient is None else gradient
        found = 0.0 if parameter.grad is None else parameter.grad / (0.01 * BATCH * LENGTH)
        assert float((found - by_hand).abs().max()) < 1e-5 * scale


def test_a_stage_without_routed_layers_takes_part_in_the_same_sums(build, monkeypatch):
    """The group in which a step's losses are summed is known to routers, and a stage may have none."""
    summed, all_reduce = [], torch.distributed.all_reduce

    def watched(values: torch.Tensor, **options: Any) -> Any:
        summed.append((len(values), options))
        return all_reduce(values, **options)

    found = []
    for pattern in ("ME*", "M**"):
        destroy_moe_metrics_tracker()
        model = build(hybrid_layer_pattern=pattern, mtp_num_layers=0)
        losses_of_layers(model, torch.ones(BATCH, LENGTH))
        monkeypatch.setattr(torch.distributed, "all_reduce", watched)
        internals.take_router_loss(model.config, 1)
        monkeypatch.undo()
        found.append(summed.copy())
        summed.clear()
    assert found[0] == found[1] and len(found[0]) == 3


def test_low_precision_is_left_out_for_a_while_in_all_parts_of_a_model(build):
    model = build()
    layers = [layer for layer in model.modules() if getattr(layer, "config", None) is not None]
    model.config.fp8 = "e4m3"
    layers[-1].te_quant_params = quantized = object()  # as Transformer Engine's layers have it under nvfp4
    with internals.without_low_precision(model):
        assert {layer.config.fp8 for layer in layers} == {layers[-1].te_quant_params} == {None}
    assert layers[0].config.fp8 == "e4m3" and layers[-1].te_quant_params is quantized
