"""The gradients of the routed experts' weights, added to their sum by the kernel that computes them.

A product that is written and then added is read again: with few rows an expert, that takes as long as the
product. Here a program computes a tile of an expert's gradient over all of its rows in fp32, adds it to the
sum and rounds once. Numbers of tokens stay on the GPU. No two programs share a tile, so results are equal to
the bit.

The factors are read through descriptors of `triton.tools.ragged_tma`: the GPU gives zeros for rows beyond an
expert's, whatever lies in memory there.
"""

# Triton gives the parameters of a kernel their types when it compiles it, and a tuple may grow in a kernel.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,assignment"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor, load_ragged

# Outputs and inputs of a tile, rows that are multiplied at a time, warps and stages of a program.
OUTPUTS, INPUTS, ROWS, WARPS, STAGES = 128, 128, 64, 4, 3


def fits(total: Tensor, grad_output: Tensor, inputs: Tensor) -> bool:
    """Whether `accumulate` is for these tensors and their GPU.

    Its sizes are Hopper's. With other widths it would spill registers.
    """
    return (
        torch.cuda.get_device_capability(total.device)[0] == 9
        and grad_output.dtype == inputs.dtype == torch.bfloat16
        and all(width % 16 == 0 for width in total.shape[1:])
        and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in (total, grad_output, inputs))
    )


@triton.jit
def _fetch(total, expert, down, across, outputs, inputs, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr):
    """Bring a tile of the sum into the L2 cache, in lines of 128 bytes."""
    LINE: tl.constexpr = 1024 // total.dtype.element_ty.primitive_bitwidth
    i = tl.minimum(down + tl.arange(0, OUTPUTS), outputs - 1)
    j = tl.minimum(across + tl.arange(0, INPUTS // LINE) * LINE, inputs - 1)
    at = total + expert.to(tl.int64) * outputs * inputs + i[:, None] * inputs + j[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _tile(
    grad_output, x, total, ends, outputs, inputs,
    ADDS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of an expert's gradient, added to the sum or written there."""
    tile = tl.program_id(0)
    wide = tl.cdiv(inputs, INPUTS)
    tiles = wide * tl.cdiv(outputs, OUTPUTS)
    expert = tile // tiles
    down, across = tile % tiles // wide * OUTPUTS, tile % tiles % wide * INPUTS
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    count = tl.load(ends + expert) - first
    if ADDS and count == 0:
        return
    if ADDS:
        _fetch(total, expert, down, across, outputs, inputs, OUTPUTS, INPUTS)
    product = tl.zeros((OUTPUTS, INPUTS), tl.float32)
    for row in range(0, count, ROWS):
        grad = load_ragged(grad_output, first, count, [row, down])
        product = tl.dot(grad.T, load_ragged(x, first, count, [row, across]), product)
    # In two halves, since the numbers of the product and of the sum are in registers.
    halves = tl.split(tl.permute(tl.reshape(product, (OUTPUTS, 2, INPUTS // 2)), (0, 2, 1)))
    i = down + tl.arange(0, OUTPUTS)
    total += expert.to(tl.int64) * outputs * inputs
    for k in tl.static_range(2):
        j = across + k * (INPUTS // 2) + tl.arange(0, INPUTS // 2)
        mask = (i < outputs)[:, None] & (j < inputs)[None, :]
        at, half = total + i[:, None] * inputs + j[None, :], halves[k]
        if ADDS:
            half += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        tl.store(at, half.to(total.dtype.element_ty), mask=mask)


def accumulate(total: Tensor, grad_output: Tensor, inputs: Tensor, ends: Tensor, *, new: bool) -> None:
    """total += for each expert grad_output^T inputs over its rows; a new total is overwritten.

    Args:
        total: (experts, outputs, inputs), bf16 or fp32.
        grad_output: (rows, outputs), and inputs: (rows, inputs), bf16, sorted by expert.
        ends: (experts,), int32, number of rows up to the end of each expert's.
    """
    experts, *widths = total.shape
    tiles = experts * triton.cdiv(widths[0], OUTPUTS) * triton.cdiv(widths[1], INPUTS)
    factors = (
        create_ragged_descriptor(grad_output, [ROWS, OUTPUTS]),
        create_ragged_descriptor(inputs, [ROWS, INPUTS]),
    )
    _tile[(tiles,)](
        *factors, total, ends, *widths, not new, OUTPUTS, INPUTS, ROWS, num_warps=WARPS, num_stages=STAGES
    )
