"""What goes to experts where tokens are gathered is what goes there by alltoall."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import snaketron.model  # noqa: F401  before megatron
from snaketron.model import backend
from snaketron.model.megatron.gathering import GatherDispatcher

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

TOKENS, EXPERTS, WIDTH = 4, 8, 16


@pytest.fixture
def dispatcher(build) -> Callable[..., Any]:
    """Makes a dispatcher of one process that has all experts."""
    model = build(hybrid_layer_pattern="E", mtp_num_layers=0)
    (layer,) = (module for module in model.modules() if isinstance(module, MoELayer))
    groups = layer.token_dispatcher
    collection = SimpleNamespace(ep=groups.ep_group, expt_tp=groups.tp_group, tp_ep=groups.tp_ep_group)
    return lambda kind: kind(EXPERTS, list(range(EXPERTS)), layer.config, collection)


def given(of: Any, tokens: Tensor, experts: list[int], weight: float) -> list[Tensor]:
    """What experts get if these are chosen for each token: tokens, the number of each, and weights."""
    device = tokens.device
    chosen = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool, device=device)
    chosen[:, experts] = True
    weights = torch.full((TOKENS, EXPERTS), weight, device=device)
    return list(of.dispatch_postprocess(*of.token_dispatch(*of.dispatch_preprocess(tokens, chosen, weights))))


def some_tokens() -> Tensor:
    return torch.arange(TOKENS * WIDTH * 1.0, device=backend.device()).view(TOKENS, 1, WIDTH)


@pytest.mark.parametrize("weight", [0.5, 0.0, torch.nan])
def test_a_chosen_expert_gets_its_tokens_whatever_their_weight(dispatcher, weight: float):
    """One that is no number must reach the loss, which ends the training."""
    kinds = GatherDispatcher, MoEAlltoAllTokenDispatcher
    gathered, expected = (given(dispatcher(kind), some_tokens(), [0, 6], weight) for kind in kinds)
    for one, other in zip(gathered, expected, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)
    assert gathered[1].tolist() == [TOKENS, 0, 0, 0, 0, 0, TOKENS, 0]


def test_experts_that_no_token_goes_to_add_nothing_to_any_of_them(dispatcher, monkeypatch):
    """Transformer Engine's functions would give no token back, and processes would wait for each other.

    It is so when a single answer grows by a token: its 22 experts are often on fewer than 8 processes.
    """
    of, tokens = dispatcher(GatherDispatcher), some_tokens().requires_grad_()
    monkeypatch.setattr(of.config, "moe_permute_fusion", True)
    rows, numbers, weights = given(of, tokens, [], 0.5)
    assert rows.shape == (0, WIDTH) and not numbers.any() and not len(weights)
    back = of.combine_postprocess(of.token_combine(of.combine_preprocess(rows * 2)))
    assert back.shape == tokens.shape and not back.any()
    back.sum().backward()
    assert tokens.grad is not None and not tokens.grad.any()
