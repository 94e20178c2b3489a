"""What goes to experts where tokens are gathered is what goes there by alltoall."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import snaketron.model  # noqa: F401  before megatron
from snaketron.model.megatron.gathering import GatherDispatcher

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

TOKENS, EXPERTS, CHOSEN = 4, 8, (0, 6)


@pytest.fixture
def given(build) -> Callable[..., list[Tensor]]:
    """What a dispatcher of one process gives experts: tokens, how many are each expert's, and weights."""
    (layer,) = (
        m for m in build(hybrid_layer_pattern="E", mtp_num_layers=0).modules() if isinstance(m, MoELayer)
    )
    groups = layer.token_dispatcher
    collection = SimpleNamespace(ep=groups.ep_group, expt_tp=groups.tp_group, tp_ep=groups.tp_ep_group)
    tokens = torch.arange(TOKENS * 16.0).view(TOKENS, 1, 16)
    chosen = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).index_fill_(1, torch.tensor(CHOSEN), True)

    def give(kind: Any, weights: Tensor) -> list[Tensor]:
        one = kind(EXPERTS, list(range(EXPERTS)), layer.config, collection)
        return list(
            one.dispatch_postprocess(*one.token_dispatch(*one.dispatch_preprocess(tokens, chosen, weights)))
        )

    return give


@pytest.mark.parametrize("weight", [0.5, 0.0, torch.nan])
def test_a_chosen_expert_gets_its_tokens_whatever_their_weight(given, weight: float):
    """One that is no number must reach the loss, which ends the training."""
    weights = torch.full((TOKENS, EXPERTS), weight)
    gathered, expected = given(GatherDispatcher, weights), given(MoEAlltoAllTokenDispatcher, weights)
    for one, other in zip(gathered, expected, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)
    assert gathered[1].tolist() == [TOKENS if expert in CHOSEN else 0 for expert in range(EXPERTS)]
