"""RMSNorm for a GPU, in Triton: that of Mamba's groups of columns, and that of whole rows.

Each is the plain formula of its docstring, computed in fp32 and rounded once.
"""

# Triton gives the parameters of a kernel their types when it compiles it.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# A program holds so many numbers at a time, or one row where that is longer.
TILE = 2048
# Numbers that a warp holds of short rows, and of rows longer than a tile; tiles that the backward pass has
# under way at once: with 2 it takes 63 us for 8,192 rows of 2,688 on an H200, with 3 it takes 48.
SHORT, LONG, STAGES = 1024, 512, 3
# The programs of the backward pass have so many warps together: about what an H200 runs at once.
WARPS = 2048
# Sums of parts and columns that a program of `_add_parts` holds at a time.
ADDED_PARTS, ADDED_COLUMNS = 256, 16
WIDEST = 8192  # columns of a row, which one program holds


@triton.jit
def _norm(x, weight, out, rstd, eps, count, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    group, groups = tl.program_id(1), tl.num_programs(1)
    at = tl.arange(0, BLOCK)
    mask = at < columns
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = (row.to(tl.int64) * groups + group)[:, None] * columns + at[None, :]
    inside = (row < count)[:, None] & mask[None, :]
    values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + group * columns + at, mask=mask, other=0.0).to(tl.float32)[None, :]
    r = tl.rsqrt(tl.sum(values * values, 1) / columns + eps)
    tl.store(rstd + group * count + row, r, mask=row < count)
    tl.store(out + place, values * r[:, None] * w, mask=inside)


@triton.jit
def _norm_back(
    x, weight, rstd, grad, added, out, parts, count, columns, summed, TRAINED: tl.constexpr,
    ADDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    part, group, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    at = tl.arange(0, BLOCK)
    mask = at < columns
    w = tl.load(weight + group * columns + at, mask=mask, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(0, summed, ROWS, num_stages=STAGES):
        row = part * summed + start + tl.arange(0, ROWS)
        place = (row.to(tl.int64) * groups + group)[:, None] * columns + at[None, :]
        inside = (row < count)[:, None] & mask[None, :]
        r = tl.load(rstd + group * count + row, mask=row < count, other=0.0)[:, None]
        normal = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * r
        g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        if TRAINED:
            total += g * normal
        mean = tl.sum(g * w * normal, 1)[:, None] / columns
        found = (g * w - normal * mean) * r
        if ADDS:
            found += tl.load(added + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + place, found, mask=inside)
    if TRAINED:
        place = (part.to(tl.int64) * groups + group) * columns + at
        tl.store(parts + place, tl.sum(total, 0), mask=mask)


@triton.jit
def _add_parts(parts, out, count, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & (at < columns)[None, :]
        total += tl.load(parts + row.to(tl.int64)[:, None] * columns + at[None, :], mask=inside, other=0.0)
    tl.store(out + at, tl.sum(total, 0), mask=at < columns)


def norm(x: Tensor, weight: Tensor, eps: float, size: int) -> tuple[Tensor, Tensor]:
    """RMSNorm of groups of columns: x / sqrt(mean of a group's x^2 + eps) * weight.

    Args:
        x: (..., columns).
        weight: (columns,).
        eps: added to the mean.
        size: columns of a group, at most `WIDEST`; the number of columns is a multiple of it.

    Returns:
        The norm (..., columns), and 1 / sqrt(mean + eps) in fp32, (groups * rows,): the first group of all
        rows, then the next.
    """
    x, groups = x.contiguous(), x.shape[-1] // size
    out, rstd = torch.empty_like(x), x.new_empty(x.numel() // size, dtype=torch.float32)
    count, block, rows, warps = _tiles(x, size)
    grid = (triton.cdiv(count, rows), groups)
    _norm[grid](x, weight, out, rstd, eps, count, size, rows, block, num_warps=warps)
    return out, rstd


def norm_back(
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    grad: Tensor,
    size: int,
    *,
    trained: bool = True,
    added: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of `x` and of `weight` in `norm`; of a weight that is not `trained` None.

    That of `x` has `added` added, which is of its shape and type. That of the weight is the sum over the rows
    of grad * x * rstd, added up in an order that depends only on the shape.
    """
    x, grad, columns = x.contiguous(), grad.contiguous(), x.shape[-1]
    added = None if added is None else added.contiguous()
    count, block, rows, warps = _tiles(x, size)
    summed = rows * max(1, triton.cdiv(count * (columns // size) * warps, WARPS * rows))
    number, out = triton.cdiv(count, summed), torch.empty_like(x)
    parts = x.new_empty(number if trained else 0, columns, dtype=torch.float32)
    grid = (number, columns // size)
    _norm_back[grid](
        x,
        weight,
        rstd,
        grad,
        added,
        out,
        parts,
        count,
        size,
        summed,
        trained,
        added is not None,
        rows,
        block,
        STAGES,
        num_warps=warps,
    )
    if not trained:
        return out, None
    total = torch.empty_like(weight)
    programs = (triton.cdiv(columns, ADDED_COLUMNS),)
    _add_parts[programs](parts, total, number, columns, ADDED_PARTS, ADDED_COLUMNS, num_warps=8)
    return out, total


def _tiles(x: Tensor, size: int) -> tuple[int, int, int, int]:
    """Rows of `x`; numbers of a row of a tile, its rows and its warps."""
    block = triton.next_power_of_2(size)
    rows = max(1, TILE // block)
    per_warp = SHORT if block <= TILE else LONG
    return x.numel() // x.shape[-1], block, rows, min(32, max(1, rows * block // per_warp))


class GroupedNorm(torch.autograd.Function):
    """`norm` of Mamba layers.

    mamba-ssm's gives a program of its backward pass one row after the other, and an H200 has few of them: its
    norm takes 249 us forwards and backwards for 8,192 rows of 8 groups of 512, and this one 101.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, size: int) -> Tensor:
        out, rstd = norm(x, weight, eps, size)
        ctx.save_for_backward(x, weight, rstd)
        ctx.size = size
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, rstd = ctx.saved_tensors
        trained = ctx.needs_input_grad[1]
        return *norm_back(x, weight, rstd, grad, ctx.size, trained=trained), None, None
