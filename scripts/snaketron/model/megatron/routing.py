"""The logits of routers in fp32, from inputs and weights in bf16, and their gradients.

megatron-core makes fp32 copies of the inputs for the backward pass and multiplies them as TF32, which has 11
bits of each number. An H200 spent 175 us a layer on it at 8,192 tokens and a width of 2,688. Inputs and
weights are bf16 anyway, and the fp32 gradient of the logits is the sum of two bf16 numbers but for its last
bits. So here all products are those of bf16 numbers, added up in fp32, with 16 bits of that gradient.
"""

from __future__ import annotations

from typing import Any

from snaketron.model.megatron.originals import original

import torch
from torch import Tensor

GATE = "megatron.core.transformer.moe.router:router_gating_linear"
PREPROCESS = "megatron.core.transformer.moe.moe_layer:MoELayer.preprocess"


def router_gating_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The logits (..., experts) in `dtype`; megatron-core's where types are others than bf16 and fp32."""
    types = (torch.bfloat16, torch.bfloat16, torch.float32)
    if bias is not None or (x.dtype, weight.dtype, dtype) != types:
        return original(GATE)(x, weight, bias, dtype)
    logits, x.passed_on = Gate.apply(x, weight)  # type: ignore[attr-defined]
    return logits


def preprocess(self: Any, x: Tensor, probs: Tensor, routing_map: Tensor) -> Any:
    """What is sent to the experts: from x as `Gate` passed it on, which then adds up both gradients of x."""
    return original(PREPROCESS)(self, x.__dict__.pop("passed_on", x), probs, routing_map)


class Gate(torch.autograd.Function):
    """x (..., width) weight^T, of bf16 in fp32, and x; weight is (experts, width).

    The gradient of x is written over that of the x that is passed on.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        logits = _product(x.flatten(0, -2), weight.T)
        return logits.view(*x.shape[:-1], -1), x

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor | None, passed: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        if grad is None:
            return passed, None
        x, weight = ctx.saved_tensors
        rows, experts = x.flatten(0, -2), len(weight)
        parts = _in_two(grad.flatten(0, -2))
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            twice = weight.repeat(2, 1)
            if passed is None:
                grad_x = parts @ twice
            else:
                grad_x = passed.contiguous().view(rows.shape).addmm_(parts, twice)
            grad_x = grad_x.view(x.shape)
        if ctx.needs_input_grad[1]:
            both = _product(parts.T, rows)
            grad_weight = both[:experts].add_(both[experts:]).to(weight.dtype)
        return grad_x, grad_weight


def _in_two(x: Tensor) -> Tensor:
    """x (rows, columns) in bf16, and beside it what that lacks of x, in bf16 too: (rows, 2 columns)."""
    rows, columns = x.shape
    parts = torch.empty(rows, 2, columns, dtype=torch.bfloat16, device=x.device)
    parts[:, 0] = x
    torch.sub(x, parts[:, 0], out=parts[:, 1])
    return parts.view(rows, 2 * columns)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """The product of two matrices in bf16, in fp32."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
