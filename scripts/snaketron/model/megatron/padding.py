"""Corrections of megatron-core 0.19.2 that hold on every machine; each goes when megatron-core has it."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter

_model_forward, _moe_forward = HybridModel.forward, MoELayer.forward


def _apply_expert_bias(
    self: TopKRouter, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None
) -> None:
    """Count the tokens of each expert, without padding.

    Theirs combines (tokens, experts) with (tokens,), which fails for every padded batch.
    """
    if self.enable_expert_bias and torch.is_grad_enabled():
        with torch.no_grad():
            if padding_mask is not None:
                routing_map = routing_map & ~padding_mask.unsqueeze(-1)
            self.local_tokens_per_expert += routing_map.sum(dim=0)


class _Padding:
    """The padding of the micro-batch that the model computes, for the layers of multi-token prediction.

    Theirs do not get it, so their routers would balance padding too. They are in the last pipeline stage, in
    which the backward pass of a micro-batch (it may compute a layer again) comes next after its forward pass.
    """

    mask: torch.Tensor | None = None


def _forward_of_model(self: HybridModel, *args: Any, **kwargs: Any) -> torch.Tensor:
    _Padding.mask = kwargs.get("padding_mask")
    return _model_forward(self, *args, **kwargs)


def _forward_of_moe(
    self: MoELayer,
    hidden_states: torch.Tensor,
    intermediate_tensors: Any = None,
    padding_mask: torch.Tensor | None = None,
) -> Any:
    if padding_mask is None:
        padding_mask = _Padding.mask
    return _moe_forward(self, hidden_states, intermediate_tensors, padding_mask)


TopKRouter._apply_expert_bias = _apply_expert_bias
HybridModel.forward = _forward_of_model
MoELayer.forward = _forward_of_moe
