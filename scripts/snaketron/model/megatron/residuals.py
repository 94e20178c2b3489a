"""Residual connections on a GPU: the norm of a layer adds both gradients of the layer's input.

A layer gives x + f(norm(x)). The gradient of x is that of the output, and what comes back through the norm.
autograd adds them in a pass of its own, which reads both and writes the sum; here the kernel of the norm's
backward pass does it, which writes one of them anyway. A norm that does not (that of Transformer Engine, or
one of another type) leaves the sum to `Enter`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from snaketron.model.megatron.originals import original

import torch
from torch import Tensor

_LAYER = "megatron.core.transformer.transformer_layer:TransformerLayer."
MAMBA = "megatron.core.ssm.mamba_layer:MambaLayer.forward"
ATTENTION = _LAYER + "_forward_attention"
MLP = _LAYER + "_forward_mlp"
ADD = "megatron.core.fusions.fused_bias_dropout:bias_dropout_add_unfused"


class Residual:
    """What one call of a layer's forward pass leaves for its backward pass.

    `key` is the address of the weight of the layer's norm and that of the norm's input, and `grad` the
    gradient of the layer's output, from the time that the backward pass comes to the layer until it is added.
    """

    def __init__(self, weight: Tensor, x: Tensor) -> None:
        self.key = _key(weight, x)
        self.grad: Tensor | None = None


def _key(weight: Tensor, x: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), x.data_ptr()


# Those whose backward pass is under way: a norm knows its weight and its input, and not its layer.
_waiting: dict[tuple[int, int], Residual] = {}


class Enter(torch.autograd.Function):
    """The input of a layer as it is; backwards the sum of both gradients, unless the norm has added them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Residual) -> Tensor:
        ctx.residual = residual
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        residual = ctx.residual
        _waiting.pop(residual.key, None)
        other, residual.grad = residual.grad, None
        return grad if other is None else grad + other, None


class Add(torch.autograd.Function):
    """y + x, where x has been through `Enter`. The gradient of x waits in `residual`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, residual: Residual) -> Tensor:
        ctx.residual = residual
        return y + x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        residual = ctx.residual
        residual.grad = grad
        _waiting[residual.key] = residual
        return grad, None, None


def enter(x: Tensor, norm: Any, product: Any) -> Tensor:
    """The input x of a layer, noted for its norm: that module, or a part of the product that follows it."""
    weight = getattr(norm, "weight", getattr(product, "layer_norm_weight", None))
    if weight is None or not (torch.is_grad_enabled() and x.requires_grad):
        return x
    _waiting.clear()  # of a backward pass that was broken off; `Enter` adds what one under way loses by it
    residual = Residual(weight, x)
    entered: Tensor = Enter.apply(x, residual)
    entered.residual = residual  # type: ignore[attr-defined]
    return entered


def take(weight: Tensor, x: Tensor, grad: Tensor) -> Tensor | None:
    """What a norm of x is to add to `grad`, the gradient of x, if it has its shape and type."""
    residual = _waiting.get(_key(weight, x))
    other = None if residual is None else residual.grad
    if residual is None or other is None or (other.numel(), other.dtype) != (grad.numel(), grad.dtype):
        return None
    del _waiting[residual.key]
    residual.grad = None
    return other.reshape(grad.shape)


# What follows takes the place of pieces of megatron-core; see `replacements`.


def mamba_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A Mamba layer of (length, batch, hidden), whose input its norm knows."""
    hidden_states = enter(hidden_states, self.norm, self.mixer.in_proj)
    return original(MAMBA)(self, hidden_states, *args, **kwargs)


def forward_attention(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Attention with its norm and sum, of (length, batch, hidden), whose input the norm knows."""
    product = getattr(self.self_attention, "linear_qkv", None)
    hidden_states = enter(hidden_states, self.input_layernorm, product)
    return original(ATTENTION)(self, hidden_states, *args, **kwargs)


def forward_mlp(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A dense layer or one of experts, with its norm and sum, of (length, batch, hidden)."""
    product = getattr(self.mlp, "linear_fc1", None)
    hidden_states = enter(hidden_states, self.pre_mlp_layernorm, product)
    return original(MLP)(self, hidden_states, *args, **kwargs)


def bias_dropout_add_unfused(training: bool) -> Callable[..., Tensor]:
    """The sum of a layer's output, with its bias and dropout, and the layer's input."""
    as_usual = original(ADD)(training)

    def add(with_bias: tuple[Tensor, Tensor | None], x: Tensor, dropout: float) -> Tensor:
        y, bias = with_bias
        residual = x.__dict__.pop("residual", None)
        if residual is None or bias is not None or dropout or (y.dtype, y.shape) != (x.dtype, x.shape):
            return as_usual(with_bias, x, dropout)
        found: Tensor = Add.apply(y, x, residual)
        return found

    return add
