"""Tokens that go to all processes that share experts, each of which takes those of its own experts.

By alltoall a token travels once for each of its experts. A token of Super has 22, so that a micro-batch of
8,192 tokens is 369 MB in each layer and direction. Here a token travels once to each other process, 17 MB a
micro-batch and process, and what its experts there gave is added up before it returns.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    all_to_all,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.moe_utils import permute, unpermute
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor


class GatherDispatcher(MoETokenDispatcher):
    """megatron-core calls these methods in their order; all processes have equally many tokens.

    Its own `MoEAllGatherTokenDispatcher` gathers the probabilities of all experts, and waits for the host
    twice in each layer.
    """

    def __init__(self, num_local_experts: int, indices: list[int], config: Any, pg_collection: Any) -> None:
        super().__init__(config, pg_collection)
        self.experts = num_local_experts
        self.counted = torch.cuda.Event() if torch.cuda.is_available() else None

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The tokens (tokens, width), and the probabilities of the experts here for all tokens.

        Those are (all tokens, experts here); where a token does not go to an expert they are -1.
        """
        self.shape = hidden_states.shape
        marked = torch.where(routing_map, probs, -1)
        parts = marked.view(len(marked), self.ep_size, self.experts).transpose(0, 1)
        here = all_to_all(self.ep_group, parts.reshape(-1, self.experts))
        self.map = here != -1  # also where a probability is no number, which must reach the loss
        self.numbers = self.map.sum(0)
        if self.counted is not None:  # the host gets the number while the tokens are gathered
            self.rows = torch.empty((), dtype=torch.long, pin_memory=True)
            self.rows.copy_(self.numbers.sum(), non_blocking=True)
            self.counted.record()
        return hidden_states.view(-1, self.shape[-1]), here

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of all processes (all tokens, width)."""
        return gather_from_sequence_parallel_region(hidden_states, group=self.ep_group), probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens of the experts here, one expert's after the other's; how many each has; the weights."""
        self.gathered = hidden_states.shape
        if self.counted is None:
            self.rows = self.numbers.sum()
        else:
            self.counted.synchronize()
        rows = int(self.rows)
        # Transformer Engine's function gives nothing back for no rows, where the others give all tokens.
        self.fused = self.config.moe_permute_fusion and rows > 0
        tokens, weights, self.order, *_ = permute(
            hidden_states, self.map, probs=probs, num_out_tokens=rows, fused=self.fused
        )
        return tokens, self.numbers, weights

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """What the experts here gave, added up for each of all tokens."""
        return unpermute(
            hidden_states,
            self.order,
            restore_shape=self.gathered,
            routing_map=self.map,
            fused=self.fused,
        )

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        """What all experts gave for the tokens of this process, added up in fp32."""
        added = reduce_scatter_to_sequence_parallel_region(hidden_states.float(), group=self.ep_group)
        return added.to(hidden_states.dtype)

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """The output in the shape of the layer's input."""
        return hidden_states.view(self.shape)
