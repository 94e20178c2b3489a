"""Routers that leave padding out, in the decoder and in multi-token prediction."""

from __future__ import annotations

from typing import Any

from snaketron.model.megatron.originals import original
from snaketron.model.megatron.packed import Expected

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter

COUNT_TOKENS = "megatron.core.transformer.moe.router:get_tokens_per_expert_and_token_count"
MODEL_FORWARD = "megatron.core.models.hybrid.hybrid_model:HybridModel.forward"
MOE_FORWARD = "megatron.core.transformer.moe.moe_layer:MoELayer.forward"


def apply_expert_bias(
    self: TopKRouter, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None
) -> None:
    """Count the tokens of each expert, without padding.

    megatron-core combines (tokens, experts) with (tokens,), which fails for every padded batch.
    """
    if self.enable_expert_bias and torch.is_grad_enabled():
        with torch.no_grad():
            if padding_mask is not None:
                routing_map = routing_map & ~padding_mask.unsqueeze(-1)
            self.local_tokens_per_expert += routing_map.sum(dim=0)


def count_tokens(
    routing_map: torch.Tensor, reduce_group: torch.distributed.ProcessGroup, **options: Any
) -> tuple[torch.Tensor, Any, Any]:
    """The tokens of each expert, a rank's share of all tokens, and all tokens of the ranks that share them.

    The router weighs the load balancing loss by that share times the ranks. megatron-core takes a rank's own
    tokens without padding for it: where one of two ranks has all the padding of a half empty pack, its tokens
    would count nothing, and those of the other twice.
    """
    per_expert, own, total = original(COUNT_TOKENS)(routing_map, reduce_group, **options)
    return per_expert, own if reduce_group.size() == 1 else total / reduce_group.size(), total


class _Padding:
    """The padding of the micro-batch that the model computes, for the layers of multi-token prediction.

    megatron-core's model does not hand it to them, so their routers would balance padding too. They are in
    the last pipeline stage, where the backward pass of a micro-batch, which may compute a layer again,
    follows its forward pass at once.
    """

    mask: torch.Tensor | None = None


def model_forward(self: HybridModel, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The forward pass of the model (see `spec.build_model`), whose padding its layers then know."""
    _Padding.mask = kwargs.get("padding_mask")
    Expected.of_model(kwargs.get("loss_mask"))
    return original(MODEL_FORWARD)(self, *args, **kwargs)


def moe_forward(
    self: MoELayer,
    hidden_states: torch.Tensor,
    intermediate_tensors: Any = None,
    padding_mask: torch.Tensor | None = None,
) -> Any:
    """A layer of experts of (length, batch, hidden), whose routers skip the padding of the micro-batch."""
    if padding_mask is None:
        padding_mask = _Padding.mask
    return original(MOE_FORWARD)(self, hidden_states, intermediate_tensors, padding_mask)
