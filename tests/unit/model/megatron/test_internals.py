"""The numbers that training reads inside megatron-core, against what they say they are."""

from __future__ import annotations

from snaketron.model.megatron import internals

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter

EXPERTS, TOPK, LENGTH, BATCH = 8, 2, 40, 3


def loss_by_hand(hidden: torch.Tensor, weight: torch.Tensor) -> float:
    """The load balancing loss of hidden states (length, batch, width), in float64.

    The mean over sequences of experts / (topk x tokens^2) x sum over experts of (tokens that chose the
    expert) x (sum over tokens of its share of the sigmoid scores): 1 where the load is even. Source:
    DeepSeek-V3 (arXiv 2412.19437), equations 17 to 20.
    """
    scores = (hidden.double() @ weight.double().T).sigmoid()  # the bias is still zero
    chosen = torch.zeros_like(scores).scatter_(-1, scores.topk(TOPK).indices, 1.0).sum(0)
    shares = (scores / scores.sum(-1, keepdim=True)).sum(0)
    return float((chosen * shares).sum(-1).mean() * EXPERTS / (TOPK * len(hidden) ** 2))


@pytest.mark.parametrize(
    ("pattern", "mtp_pattern", "depths", "losses"),
    [
        ("E-M*", "M*", 2, 1),  # no routed layer in multi-token prediction
        ("E*", "EE", 2, 5),  # two of them, at each of two depths
        ("EE", "*E", 2, 4),
        ("ME", "*E", 0, 1),
        ("M*", "*E", 1, 1),
        ("M*", "M*", 1, 0),
    ],
)
def test_the_load_balancing_loss_is_the_mean_over_routed_layers(build, pattern, mtp_pattern, depths, losses):
    model = build(
        hybrid_layer_pattern=pattern,
        mtp_hybrid_layer_pattern=mtp_pattern,
        mtp_num_layers=depths,
        init_method_std=0.3,  # so that the load is uneven, and each layer has another loss
    )
    seen: list[float] = []

    def note(router: TopKRouter, arguments: tuple[torch.Tensor, ...], _output: object) -> None:
        seen.append(loss_by_hand(arguments[0].detach(), router.weight.detach()))

    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.register_forward_hook(note)
    ids = torch.randint(0, 256, (BATCH, LENGTH))
    model(ids, None, None, labels=ids, loss_mask=torch.ones_like(ids).float()).sum().backward()
    assert len(seen) == losses
    expected = sum(seen) / len(seen) if seen else 0.0
    routed = pattern.count("E") + depths * mtp_pattern.count("E")
    assert internals.take_router_loss(model.config, routed) == pytest.approx(expected, rel=1e-5)
    assert internals.take_router_loss(model.config, routed) == 0  # the tracker is empty again
