"""The products of the routed experts in fp8 (e4m3), with one scale for each row of a factor.

Each token, and each output of a weight, has a scale of its own, which is a factor of the sum of its products:
no value is cut off, and a token with large values takes no precision from the others. Numbers of tokens stay
on the GPU. Products that give the gradients of weights stay in bf16: they would need each factor transposed
in fp8 too.
"""

# Triton gives the parameters of a kernel their types when it compiles it, and a tuple may grow in a kernel.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,assignment"
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

FP8 = torch.float8_e4m3fn
LARGEST = tl.constexpr(448.0)  # of e4m3
# Tiles of `product`, in which an H200 reached 900 to 1,100 TFLOP/s with the widths of Nemotron 3.
ROWS, COLUMNS, INNER = 128, 256, 128
WIDEST = 16384  # a row is kept in registers
# Numbers of a row that a program rounds at a time, and its warps; the rows and columns of a weight that it
# transposes at a time.
PART, WARPS = 1024, 4
BLOCK_OUT, BLOCK_IN = 128, 64


class Rounded(NamedTuple):
    """Weights of experts (experts, outputs, inputs) in fp8, and transposed, with the scales of both."""

    weights: Tensor
    scales: Tensor  # (experts, outputs)
    transposed: Tensor
    transposed_scales: Tensor  # (experts, inputs)


def fits(weights: Tensor) -> bool:
    """Whether the kernels here compute with such weights."""
    return all(width % 16 == 0 and width <= WIDEST for width in weights.shape[1:])


@triton.jit
def _scale(largest):
    return tl.maximum(largest, 1e-30) / LARGEST


@triton.jit
def _store_rounded(row, largest, kept, out, scales, columns, PART: tl.constexpr, PARTS: tl.constexpr):
    """Store a row in fp8: `kept` has its parts, `largest` the largest number of all parts at each place."""
    scale = _scale(tl.max(largest, 0))
    tl.store(scales + row, scale)
    for i in tl.static_range(PARTS):
        at = i * PART + tl.arange(0, PART)
        tl.store(
            out + row * columns + at, (kept[i] * (1 / scale)).to(out.dtype.element_ty), mask=at < columns
        )


@triton.jit
def _round_rows(source, out, scales, columns, PART: tl.constexpr, PARTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([PART], tl.float32)
    kept = ()
    for i in tl.static_range(PARTS):
        at = i * PART + tl.arange(0, PART)
        x = tl.load(source + row * columns + at, mask=at < columns, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
        kept += (x,)
    _store_rounded(row, largest, kept, out, scales, columns, PART, PARTS)


@triton.jit
def _activate(hidden, probs, out, scales, columns, PART: tl.constexpr, PARTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    p = tl.load(probs + row).to(tl.float32)
    largest = tl.zeros([PART], tl.float32)
    kept = ()
    for i in tl.static_range(PARTS):
        at = i * PART + tl.arange(0, PART)
        relu = tl.load(hidden + row * columns + at, mask=at < columns, other=0.0).to(tl.float32)
        relu = tl.maximum(relu, 0.0)
        x = relu * relu * p
        largest = tl.maximum(largest, tl.abs(x))
        kept += (x,)
    _store_rounded(row, largest, kept, out, scales, columns, PART, PARTS)


@triton.jit
def _activate_back(
    hidden, probs, grad, out, grad_probs, rounded, scales, columns, PART: tl.constexpr, PARTS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    p = tl.load(probs + row).to(tl.float32)
    largest = tl.zeros([PART], tl.float32)
    total = tl.zeros([PART], tl.float32)
    kept = ()
    for i in tl.static_range(PARTS):
        at = i * PART + tl.arange(0, PART)
        place, mask = row * columns + at, at < columns
        relu = tl.maximum(tl.load(hidden + place, mask=mask, other=0.0).to(tl.float32), 0.0)
        g = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + place, relu * relu * p, mask=mask)
        total += relu * relu * g
        x = 2 * relu * g * p
        tl.store(grad + place, x, mask=mask)
        largest = tl.maximum(largest, tl.abs(x))
        kept += (x,)
    tl.store(grad_probs + row, tl.sum(total))
    _store_rounded(row, largest, kept, rounded, scales, columns, PART, PARTS)


@triton.jit
def _transpose(source, out, scales, outputs, inputs, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr):
    column, expert = tl.program_id(0) * BLOCK_IN + tl.arange(0, BLOCK_IN), tl.program_id(1).to(tl.int64)
    source += expert * outputs * inputs
    out += expert * outputs * inputs
    largest = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for start in range(0, outputs, BLOCK_OUT):
        row = start + tl.arange(0, BLOCK_OUT)
        mask = (row < outputs)[:, None] & (column < inputs)[None, :]
        x = tl.load(source + row[:, None] * inputs + column[None, :], mask=mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(x))
    scale = _scale(tl.max(largest, 0))
    tl.store(scales + expert * inputs + column, scale, mask=column < inputs)
    for start in range(0, outputs, BLOCK_OUT):
        row = start + tl.arange(0, BLOCK_OUT)
        mask = (row < outputs)[:, None] & (column < inputs)[None, :]
        x = tl.load(source + row[:, None] * inputs + column[None, :], mask=mask, other=0.0).to(tl.float32)
        x = (x * (1 / scale)[None, :]).to(out.dtype.element_ty)
        tl.store(out + column[:, None] * outputs + row[None, :], x.T, mask=mask.T)


@triton.jit
def _product(
    x,
    scales,
    weights,
    weight_scales,
    out,
    ends,
    tile_ends,
    experts,
    outputs,
    inner,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    number = tl.arange(0, EXPERTS)
    last_tiles = tl.load(tile_ends + number, mask=number < experts, other=2**30)
    across = tl.cdiv(outputs, COLUMNS)
    tiles = tl.load(tile_ends + experts - 1) * across
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS):
        down = tile // across
        column = tile % across * COLUMNS
        expert = tl.sum((last_tiles <= down).to(tl.int32))
        first = tl.load(tile_ends + expert - 1, mask=expert > 0, other=0)
        row = tl.load(ends + expert - 1, mask=expert > 0, other=0) + (down - first) * ROWS
        end = tl.load(ends + expert)
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        for at in range(0, inner, INNER):
            part = weights.load([expert * outputs + column, at])
            product = tl.dot(x.load([row, at]), part.T, product)
        at_row, at_column = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        by_row = tl.load(scales + at_row, mask=at_row < end, other=0.0)
        by_column = tl.load(weight_scales + expert * outputs + at_column, mask=at_column < outputs, other=0.0)
        product = product * by_row[:, None] * by_column[None, :]
        mask = (at_row < end)[:, None] & (at_column < outputs)[None, :]
        place = out + at_row.to(tl.int64)[:, None] * outputs + at_column[None, :]
        tl.store(place, product.to(out.dtype.element_ty), mask=mask)


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (rows, columns) in fp8, and the scale of each row."""
    out, scales = _like(x)
    _round_rows[(len(x),)](x, out, scales, x.shape[1], *_parts(x), num_warps=WARPS)
    return out, scales


def activate(hidden: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.activate` in fp8, and the scale of each row."""
    out, scales = _like(hidden)
    _activate[(len(hidden),)](hidden, probs, out, scales, hidden.shape[1], *_parts(hidden), num_warps=WARPS)
    return out, scales


def activate_back(
    hidden: Tensor, probs: Tensor, grad: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The output of `kernels.activate` again; the gradients of `hidden`, in the place of `grad`, and `probs`.

    The gradient of `hidden` comes in fp8 too, with the scale of each row. `hidden` is kept, because the
    output of the forward pass was rounded to fp8.
    """
    out, grad_probs = torch.empty_like(hidden), torch.empty_like(probs)
    rounded, scales = _like(hidden)
    _activate_back[(len(hidden),)](
        hidden,
        probs,
        grad,
        out,
        grad_probs,
        rounded,
        scales,
        hidden.shape[1],
        *_parts(hidden),
        num_warps=WARPS,
    )
    return (out, grad, grad_probs), (rounded, scales)


def empty(weights: Tensor) -> Rounded:
    """Memory for `round_weights`."""
    experts, outputs, inputs = weights.shape

    def make(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=weights.device)

    return Rounded(
        make(experts, outputs, inputs, dtype=FP8),
        make(experts, outputs, dtype=torch.float32),
        make(experts, inputs, outputs, dtype=FP8),
        make(experts, inputs, dtype=torch.float32),
    )


def round_weights(weights: Tensor, rounded: Rounded) -> None:
    """Fill `rounded` from weights (experts, outputs, inputs)."""
    experts, outputs, inputs = weights.shape
    _round_rows[(experts * outputs,)](
        weights, rounded.weights, rounded.scales, inputs, *_parts(weights), num_warps=WARPS
    )
    _transpose[(triton.cdiv(inputs, BLOCK_IN), experts)](
        weights,
        rounded.transposed,
        rounded.transposed_scales,
        outputs,
        inputs,
        BLOCK_OUT,
        BLOCK_IN,
        num_warps=WARPS,
    )


def tile_ends(ends: Tensor) -> Tensor:
    """Up to each expert, how many tiles its tokens and those before it take: of `ends` as in `Experts`."""
    numbers = torch.diff(ends, prepend=ends.new_zeros(1))
    return ((numbers + ROWS - 1) // ROWS).cumsum(0).int()


def product(x: tuple[Tensor, Tensor], weights: Tensor, scales: Tensor, ends: Tensor, tiles: Tensor) -> Tensor:
    """x weights^T, each token by its own expert: (tokens, outputs), bf16.

    Args:
        x: (tokens, inner) in fp8, and (tokens,) scales.
        weights: (experts, outputs, inner) in fp8; scales: (experts, outputs).
        ends, tiles: (experts,), int32, of `Experts` and `tile_ends`.
    """
    values, by_row = x
    experts, outputs, inner = weights.shape
    out = torch.empty(len(values), outputs, dtype=torch.bfloat16, device=values.device)
    programs = torch.cuda.get_device_properties(values.device).multi_processor_count
    _product[(programs,)](
        TensorDescriptor.from_tensor(values, [ROWS, INNER]),
        by_row,
        TensorDescriptor.from_tensor(weights.view(experts * outputs, inner), [COLUMNS, INNER]),
        scales,
        out,
        ends,
        tiles,
        experts,
        outputs,
        inner,
        triton.next_power_of_2(experts),
        ROWS,
        COLUMNS,
        INNER,
        programs,
        num_warps=8,
        num_stages=3,
    )
    return out


def _like(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=FP8, device=x.device), torch.empty(len(x), device=x.device)


def _parts(x: Tensor) -> tuple[int, int]:
    """How many numbers of a row are a part, and how many parts a row has."""
    part = min(PART, triton.next_power_of_2(x.shape[-1]))
    return part, triton.cdiv(x.shape[-1], part)
