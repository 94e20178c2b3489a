"""The routed experts of a layer as a handful of kernels that the host need not wait for.

Transformer Engine's GroupedLinear takes the number of tokens of each expert as a list, so that the host
waits for the router in every layer, and then handles each expert's matrix in Python: on an H200 at 16k tokens
that kept the host busy for 20 ms a layer and the GPU idle for half of a step. Here the numbers stay on the
GPU and the matrices of all experts are one tensor, which they are in the buffers of megatron-core's
DistributedDataParallel. Parameters, their names and the checkpoint stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from snaketron.model.megatron import gradients

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_weighted_squared_relu import (
    weighted_squared_relu,
    weighted_squared_relu_back,
    weighted_squared_relu_impl,
)
from torch import Tensor

if torch.cuda.is_available():
    from snaketron.model.megatron import expert_gradients, experts8, kernels


def stacked(parts: Sequence[Tensor]) -> Tensor | None:
    """Tensors of one shape that follow each other in memory as one (count, ...); None if they do not."""
    first = parts[0]
    step, start = first.numel() * first.element_size(), first.data_ptr()
    # Tensors with memory of their own may follow each other by chance.
    memory = first.untyped_storage().data_ptr()
    for i, part in enumerate(parts):
        if part.untyped_storage().data_ptr() != memory:
            return None
        if part.data_ptr() != start + i * step or not part.is_contiguous():
            return None
    strides = [first.numel(), *first.stride()]
    return first.detach().as_strided([len(parts), *first.shape], strides)


class Experts(torch.autograd.Function):
    """fc2(squared_relu(fc1(x)) * probability), each token by its own expert.

    Gradients of the weights are added to `main_grad`, as megatron-core's fused accumulation does. The first
    weight of each kind is an input, so that autograd calls the hooks that wait for the weights. There may be
    no token, where processes share experts.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        probs: Tensor,
        ends: Tensor,
        fc1: Tensor,
        fc2: Tensor,
        weights: tuple[Tensor, Tensor],
        grads: tuple[Tensor, Tensor] | None,
        rounded: tuple[Any, Any] | None = None,
    ) -> Tensor:
        """The outputs, with what the backward pass needs put by.

        Args:
            x: (tokens, input), sorted by expert.
            probs: (tokens, 1), weight of an expert's output.
            ends: (experts,), int32, number of tokens up to the end of each expert's.
            fc1, fc2: the first experts' parameters.
            weights: (experts, inner, input) and (experts, output, inner).
            grads: `main_grad` of the weights, of the same shapes; None: nothing to train.
            rounded: the weights as `experts8.Rounded`, in whose precision the products with them are then
                computed, forwards and backwards.

        Returns:
            (tokens, output).
        """
        ctx.weights, ctx.grads, ctx.first, ctx.rounded = weights, grads, (fc1, fc2), rounded
        if not len(x):
            kept = out = x.new_empty(0, weights[1].shape[1])
        elif rounded is None:
            kept = _activate(torch._grouped_mm(x, weights[0].mT, offs=ends), probs)
            out = torch._grouped_mm(kept, weights[1].mT, offs=ends)
            ctx.tiles = None
        else:
            ctx.tiles = tiles = experts8.tile_ends(ends)
            inner, outer = rounded
            kept = experts8.product(experts8.round_rows(x), inner.weights, inner.scales, ends, tiles)
            activated = experts8.activate(kept, probs)
            out = experts8.product(activated, outer.weights, outer.scales, ends, tiles)
        ctx.save_for_backward(x, probs, ends, kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, probs, ends, kept = ctx.saved_tensors
        if not len(x):
            for total in ctx.grads:
                if gradients.is_new(total):
                    total.zero_()
            placeholders = (_added(first) for first in ctx.first)
            return torch.empty_like(x), torch.empty_like(probs), None, *placeholders, None, None, None
        grad = grad.contiguous()
        if ctx.rounded is None:
            grad_activated = torch._grouped_mm(grad, ctx.weights[1], offs=ends)
            activated = kept
            grad_hidden, grad_probs = _activate_back(activated, probs, grad_activated)
            grad_x = torch._grouped_mm(grad_hidden, ctx.weights[0], offs=ends)
        else:
            tiles, (inner, outer) = ctx.tiles, ctx.rounded
            grad_activated = experts8.product(
                experts8.round_rows(grad), outer.transposed, outer.transposed_scales, ends, tiles
            )
            (activated, grad_hidden, grad_probs), short = experts8.activate_back(kept, probs, grad_activated)
            grad_x = experts8.product(short, inner.transposed, inner.transposed_scales, ends, tiles)
        _accumulate(ctx.grads[1], grad, activated, ends)
        del activated
        _accumulate(ctx.grads[0], grad_hidden, x, ends)
        return grad_x, grad_probs, None, *(_added(first) for first in ctx.first), None, None, None


def frozen_experts(
    x: Tensor,
    probs: Tensor,
    ends: Tensor,
    weights: tuple[Tensor, Tensor],
    adapters: Sequence[Callable[[Tensor, Tensor], Tensor] | None] = (None, None),
) -> Tensor:
    """Like `Experts`, for weights that are not trained, with the adapters of both products if there are any.

    Arguments and result are those of `Experts`; an adapter gets the input of its product and `ends`.
    """

    def product(x: Tensor, i: int) -> Tensor:
        y = torch._grouped_mm(x, weights[i].mT, offs=ends) if len(x) else F.linear(x, weights[i][0])
        adapter = adapters[i]
        return y if adapter is None else y + adapter(x, ends)

    return product(weighted_squared_relu_impl(product(x, 0), probs), 1)


def _activate(hidden: Tensor, probs: Tensor) -> Tensor:
    return kernels.activate(hidden, probs) if hidden.is_cuda else weighted_squared_relu(hidden, probs)


def _activate_back(activated: Tensor, probs: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `hidden` and `probs` from the output of `_activate`; `grad` may be overwritten."""
    if activated.is_cuda:
        return kernels.activate_back(activated, probs, grad)
    relu = torch.where(probs > 0, activated / probs, 0).sqrt().to(activated.dtype)
    return weighted_squared_relu_back(grad, relu, probs)


def _accumulate(total: Tensor, grad_output: Tensor, inputs: Tensor, ends: Tensor) -> None:
    """total (experts, output, input) += for each expert grad_output^T inputs; a new one is overwritten."""
    new = gradients.is_new(total)
    if total.is_cuda and expert_gradients.fits(total, grad_output, inputs):
        expert_gradients.accumulate(total, grad_output, inputs, ends, new=new)
        return
    product = torch._grouped_mm(grad_output.mT, inputs, offs=ends)
    if new:
        total.copy_(product)
    else:
        total.add_(product)


def _added(parameter: Tensor) -> Tensor:
    """A placeholder for autograd: the gradient is in main_grad already."""
    parameter.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    parameter.others_added = True  # type: ignore[attr-defined]  # `gpu.make_backward_post_hook` reports them
    return torch.empty_like(parameter)
