"""The routed experts of a rank on a CPU.

megatron-core calls one expert after the other: some fifteen small operations for each, and as many nodes of
autograd. Only the products have to be one by one; the rest is done for all experts at once, and the gradients
are written out.
"""

from __future__ import annotations

import itertools
from typing import Any

from snaketron.model.megatron import originals

import torch
from megatron.core.activations import squared_relu
from torch import Tensor

_EXPERTS = "megatron.core.transformer.moe.experts:SequentialMLP.forward"


def experts_forward(
    self: Any, hidden: Tensor, tokens_per_expert: Tensor, probs: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The routed experts; without gradients only those that have tokens, which are few for few tokens.

    In a training each expert takes part, so that each has gradients.

    `hidden` (tokens, width) has the tokens of the first expert first, and `probs` (tokens,) their weights.
    """
    if not torch.is_grad_enabled():
        counts = tokens_per_expert.tolist()
        parts = zip(self.local_experts, hidden.split(counts), probs.split(counts), strict=True)
        out = [expert(tokens, weights)[0] for expert, tokens, weights in parts if len(tokens)]
        return torch.cat(out) if out else hidden, None
    if not _is_plain(self, hidden, probs):
        return originals.original(_EXPERTS)(self, hidden, tokens_per_expert, probs)
    weights = [
        linear.weight for expert in self.local_experts for linear in (expert.linear_fc1, expert.linear_fc2)
    ]
    return _Experts.apply(hidden, probs, tokens_per_expert.tolist(), *weights), None


def _is_plain(experts: Any, hidden: Tensor, probs: Tensor) -> bool:
    """Whether the experts are two whole linear layers without adapters, with a squared ReLU in between."""
    config, tensors = experts.config, (hidden, probs, experts.local_experts[0].linear_fc1.weight)
    return (
        config.activation_func is squared_relu
        and not (config.gated_linear_unit or config.add_bias_linear or config.moe_apply_probs_on_input)
        and experts.tp_group.size() == 1
        and len({tensor.dtype for tensor in tensors}) == 1
        and not any(
            linear._forward_hooks
            for expert in experts.local_experts
            for linear in (expert.linear_fc1, expert.linear_fc2)
        )
    )


class _Experts(torch.autograd.Function):
    """probs * relu(x W1^T)^2 W2^T for the tokens of each expert."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probs: Tensor, counts: list[int], *weights: Tensor) -> Tensor:
        """`weights` are W1 (ffn, width) and W2 (width, ffn) of each expert in turn."""
        parts = [slice(*ends) for ends in itertools.pairwise(itertools.accumulate(counts, initial=0))]
        hidden, out = x.new_empty(len(x), len(weights[0])), torch.empty_like(x)
        for part, first in zip(parts, weights[::2], strict=True):
            torch.mm(x[part], first.t(), out=hidden[part])
        hidden.relu_()
        weighted = (hidden * hidden).mul_(probs.unsqueeze(-1))
        for part, second in zip(parts, weights[1::2], strict=True):
            torch.mm(weighted[part], second.t(), out=out[part])
        ctx.save_for_backward(x, probs, hidden, weighted, *weights)
        ctx.parts = parts
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, probs, hidden, weighted, *weights = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_hidden, grad_x = torch.empty_like(hidden), torch.empty_like(x)
        for part, second in zip(ctx.parts, weights[1::2], strict=True):
            torch.mm(grad[part], second, out=grad_hidden[part])
        grad_hidden.mul_(hidden)
        grad_probs = (grad_hidden * hidden).sum(-1)
        grad_hidden.mul_(probs.unsqueeze(-1) * 2)
        grad_weights: list[Tensor] = []
        for part, first in zip(ctx.parts, weights[::2], strict=True):
            torch.mm(grad_hidden[part], first, out=grad_x[part])
            grad_weights += [grad_hidden[part].t() @ x[part], grad[part].t() @ weighted[part]]
        return grad_x, grad_probs, None, *grad_weights
