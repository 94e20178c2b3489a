"""Corrections of megatron-core 0.19.2 that hold on every machine; each goes when megatron-core has it."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.router import TopKRouter


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


TopKRouter._apply_expert_bias = _apply_expert_bias
