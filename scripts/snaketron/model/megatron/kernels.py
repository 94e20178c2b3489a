"""Kernels for a GPU, in Triton: what is between the products of experts, and AdamW.

Each is the plain formula of its docstring, computed in fp32 and rounded once.
"""

# Triton gives the parameters of a kernel their types when it compiles it.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _activate(hidden, probs, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    p = tl.load(probs + row).to(tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < columns
        relu = tl.maximum(tl.load(hidden + row * columns + at, mask=mask, other=0.0).to(tl.float32), 0.0)
        tl.store(out + row * columns + at, relu * relu * p, mask=mask)


@triton.jit
def _activate_back(activated, probs, grad, grad_probs, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    p = tl.load(probs + row).to(tl.float32)
    inverse = tl.where(p > 0, 1 / p, 0.0)
    total = 0.0
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < columns
        out = tl.load(activated + row * columns + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + row * columns + at, mask=mask, other=0.0).to(tl.float32)
        square = out * inverse
        tl.store(grad + row * columns + at, 2 * tl.sqrt(square) * g * p, mask=mask)
        total += tl.sum(square * g)
    tl.store(grad_probs + row, total)


def activate(hidden: Tensor, probs: Tensor) -> Tensor:
    """relu(hidden)^2 probs, of (rows, columns) and (rows, 1)."""
    out = torch.empty_like(hidden)
    _activate[(len(hidden),)](hidden, probs, out, hidden.shape[1], _block(hidden), num_warps=4)
    return out


def activate_back(activated: Tensor, probs: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `hidden`, in the place of `grad`, and of `probs`, from the output of `activate`.

    relu(hidden) is sqrt(activated / probs), so that `hidden` need not be kept, and a fourth of the bytes of a
    function that reads it and writes `activated` again are not moved. A root halves the relative error of the
    rounded output. A row whose probability is 0 has gradients of 0.
    """
    grad_probs = torch.empty_like(probs)
    _activate_back[(len(activated),)](
        activated, probs, grad, grad_probs, activated.shape[1], _block(activated), num_warps=4
    )
    return grad, grad_probs


def _block(tensor: Tensor) -> int:
    return min(2048, triton.next_power_of_2(tensor.shape[1]))


# Numbers of a tensor that one program of `_adam` updates, and of `_squares` sums.
ADAM_BLOCK, SQUARES_BLOCK = 2048, 8192


@triton.jit
def _update(
    gradient, weight, mean, square, remainder, at, mask, scale, lr, beta1, beta2, eps, decay, bias1, bias2
):
    g = tl.load(gradient + at, mask=mask).to(tl.float32) * scale
    high, low = tl.load(weight + at, mask=mask).to(tl.int32), tl.load(remainder + at, mask=mask).to(tl.int32)
    w = (((high - (low < 0).to(tl.int32)) << 16) | (low & 0xFFFF)).to(tl.float32, bitcast=True)
    m = beta1 * tl.load(mean + at, mask=mask).to(tl.float32) + (1 - beta1) * g
    v = beta2 * tl.load(square + at, mask=mask).to(tl.float32) + (1 - beta2) * g * g
    w -= lr * (m / bias1 / (tl.sqrt(v / bias2) + eps) + decay * w)
    bits = w.to(tl.int32, bitcast=True)
    low = (bits << 16) >> 16
    tl.store(weight + at, ((bits >> 16) + (low < 0).to(tl.int32)).to(tl.int16), mask=mask)
    tl.store(remainder + at, low.to(tl.int16), mask=mask)
    tl.store(mean + at, m.to(tl.bfloat16), mask=mask)
    tl.store(square + at, v.to(tl.bfloat16), mask=mask)


@triton.jit
def _adam(table, scale, lr, beta1, beta2, eps, decay, bias1, bias2, BLOCK: tl.constexpr):
    row = table + tl.program_id(0).to(tl.int64) * 6
    gradient = tl.load(row).to(tl.pointer_type(tl.bfloat16))
    weight = tl.load(row + 1).to(tl.pointer_type(tl.int16))
    mean = tl.load(row + 2).to(tl.pointer_type(tl.bfloat16))
    square = tl.load(row + 3).to(tl.pointer_type(tl.bfloat16))
    remainder = tl.load(row + 4).to(tl.pointer_type(tl.int16))
    count = tl.load(row + 5)
    s, at = tl.load(scale), tl.arange(0, BLOCK)
    if count == BLOCK:  # of tensors that begin at a multiple of 16 bytes: they are read 16 bytes at a time
        gradient, weight = tl.multiple_of(gradient, 16), tl.multiple_of(weight, 16)
        mean, square = tl.multiple_of(mean, 16), tl.multiple_of(square, 16)
        remainder = tl.multiple_of(remainder, 16)
        _update(
            gradient, weight, mean, square, remainder, at, None, s, lr, beta1, beta2, eps, decay, bias1, bias2
        )
    else:
        mask = at < count
        _update(
            gradient, weight, mean, square, remainder, at, mask, s, lr, beta1, beta2, eps, decay, bias1, bias2
        )


@triton.jit
def _squares(table, out, BLOCK: tl.constexpr):
    row = table + tl.program_id(0).to(tl.int64) * 2
    values, count, at = tl.load(row).to(tl.pointer_type(tl.bfloat16)), tl.load(row + 1), tl.arange(0, BLOCK)
    if count == BLOCK:
        x = tl.load(tl.multiple_of(values, 16) + at).to(tl.float32)
    else:
        x = tl.load(values + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(out + tl.program_id(0), tl.sum(x * x))


def norm(table: Tensor) -> Tensor:
    """The square root of the sum of the squares of bf16 numbers, (1,) in fp32.

    Args:
        table: of `blocks` of `SQUARES_BLOCK`, on the GPU.
    """
    sums = torch.empty(len(table), dtype=torch.float32, device=table.device)
    _squares[(len(table),)](table, sums, SQUARES_BLOCK, num_warps=8)
    return sums.sum().sqrt().reshape(1)


def adam(table: Tensor, scale: Tensor, group: dict[str, float], step: int) -> None:
    """AdamW of bf16 gradients times `scale`, and bf16 moments. An fp32 weight is a bf16 one and 16 bits more.

    Args:
        table: of `adam.blocks` of `ADAM_BLOCK`, on the GPU.
        scale: (1,), fp32, on the GPU.
        group: `lr`, `beta1`, `beta2`, `eps` and `weight_decay`.
        step: the number of this step, from 1.
    """
    if len(table):
        _adam[(len(table),)](
            table,
            scale,
            group["lr"],
            group["beta1"],
            group["beta2"],
            group["eps"],
            group["weight_decay"],
            1 - group["beta1"] ** step,
            1 - group["beta2"] ** step,
            ADAM_BLOCK,
            num_warps=8,
        )
