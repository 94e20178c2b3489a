"""Kernels of the backward pass of Mamba-2's scan, in Triton: the gradients of x and of the steps.

Names and shapes: batch b, length l, heads h, groups g, chunks c, positions of a chunk k, width of a head p,
width of a state n. `step` is dt after softplus and `decay` the sum of dt A since the start of a chunk, both
(b, h, c, k) in fp32; `scores` C_i B_j, (b, c, g, k, k).
"""

# Triton gives the parameters of a kernel their types when it compiles it.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# The side of a square of scores that a program of `_scores_back` has, its warps and stages; the heads that a
# program of `_step_back` has, and its warps.
SIDE, SCORES_WARPS, SCORES_STAGES = 64, 4, 3
HEADS, STEP_WARPS = 16, 4
# The positions that a program of `_x_back` has, and at a time reads; its warps and stages.
X_SIDE, X_WARPS, X_STAGES = 64, 4, 1
# `scan_output` says why.
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _scores_back(
    x, grad, scores, step, decay, sequence, out, sums, length, chunk, heads, width, x_batch, x_position,
    grad_batch, grad_position, columns_at, HAS_SEQUENCE: tl.constexpr, SIDE: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    place, group, groups = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    sides, chunks = tl.cdiv(chunk, SIDE), tl.cdiv(length, chunk)
    side_i, side_j = tl.program_id(0) // sides, tl.program_id(0) % sides
    b, c = place // chunks, place % chunks
    i, j = side_i * SIDE + tl.arange(0, SIDE), side_j * SIDE + tl.arange(0, SIDE)
    square = ((place * groups + group).to(tl.int64) * chunk + i)[:, None] * chunk + j[None, :]
    there = (i < chunk)[:, None] & (j < chunk)[None, :]
    if side_j > side_i:
        tl.store(out + square, tl.zeros([SIDE, SIDE], tl.float32), mask=there)
        return
    start = c * chunk
    left = tl.minimum(chunk, length - start)
    wanted = i[:, None] >= j[None, :]
    if HAS_SEQUENCE:
        first = sequence + b.to(tl.int64) * length + start
        of_i, of_j = tl.load(first + i, mask=i < left, other=-1), tl.load(first + j, mask=j < left, other=-2)
        wanted = wanted & (of_i[:, None] == of_j[None, :])
    before = tl.load(scores + square, mask=there & (i[:, None] > j[None, :]), other=0.0)
    p = tl.arange(0, WIDTH)
    grad += b.to(tl.int64) * grad_batch + start.to(tl.int64) * grad_position + group * heads * width
    x += b.to(tl.int64) * x_batch + start.to(tl.int64) * x_position + group * heads * width
    grads = grad + i[:, None] * grad_position + p[None, :]
    values = x + j[None, :] * x_position + p[:, None]
    grads_there = (i < left)[:, None] & (p < width)[None, :]
    values_there = (p < width)[:, None] & (j < left)[None, :]
    total = tl.zeros([SIDE, SIDE], tl.float32)
    for h in range(heads):
        at = ((b * groups * heads + group * heads + h) * chunks + c) * chunk
        g = tl.load(grads + h * width, mask=grads_there, other=0.0)
        v = tl.load(values + h * width, mask=values_there, other=0.0)
        step_j = tl.load(step + at + j, mask=j < chunk, other=0.0)
        decay_i = tl.load(decay + at + i, mask=i < left, other=0.0) * LOG2E
        decay_j = tl.load(decay + at + j, mask=j < left, other=0.0) * LOG2E
        product = tl.dot(g, v) * step_j[None, :]
        product *= tl.exp2(tl.minimum(decay_i[:, None] - decay_j[None, :], 0.0))
        total += product
        product *= before
        to = sums + at.to(tl.int64) * sides
        tl.store(to + side_j * chunk + i, tl.sum(product, 1), mask=i < chunk)
        tl.store(to + columns_at + side_i * chunk + j, tl.sum(product, 0), mask=j < chunk)
    tl.store(out + square, tl.where(wanted, total, 0.0), mask=there)


def scores_back(
    x: Tensor, grad: Tensor, scores: Tensor, step: Tensor, decay: Tensor, sequence: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient of the scores, and what they give to the gradient of `decay`.

    With P_ij = grad_i x_j step_j exp(decay_i - decay_j) for j <= i of one sequence, and 0 elsewhere, the
    former is P summed over the heads of a group, in the type of x, and decay_i gets the sum over j < i of
    P_ij scores_ij, less that over j > i of P_ji scores_ji. mamba-ssm has a kernel for each: both together
    take 221 us for 8,192 tokens of 64 heads on an H200.

    Args:
        x, grad: (b, l, h, p), whose heads lie side by side.
        sequence: (b, l), contiguous.

    Returns:
        (b, c, g, k, k), and parts of the sums over rows and over columns for `step_back`,
        (2, b, h, c, sides, k): of the rows of a side those up to it, of its columns those from it on.
    """
    batch, length, heads, width = x.shape
    chunks, groups, chunk = scores.shape[1:4]
    side = min(SIDE, max(16, triton.next_power_of_2(chunk)))
    sides = triton.cdiv(chunk, side)
    out = torch.empty_like(scores, dtype=x.dtype)
    sums = torch.empty(2, batch, heads, chunks, sides, chunk, dtype=torch.float32, device=x.device)
    _scores_back[(sides * sides, batch * chunks, groups)](
        x,
        grad,
        scores,
        step,
        decay,
        sequence,
        out,
        sums,
        length,
        chunk,
        heads // groups,
        width,
        x.stride(0),
        x.stride(1),
        grad.stride(0),
        grad.stride(1),
        sums[0].numel(),
        sequence is not None,
        side,
        max(16, triton.next_power_of_2(width)),
        num_warps=SCORES_WARPS,
        num_stages=SCORES_STAGES,
    )
    return out, sums


@triton.jit
def _x_back(
    x, grad, scores, step, decay, states_grad, b_of, d_of, sequence, out, step_grad, length, chunk, heads,
    width, state, x_batch, x_position, grad_batch, grad_position, b_batch, b_position, out_batch,
    out_position, HAS_SEQUENCE: tl.constexpr, WIDE_D: tl.constexpr, SIDE: tl.constexpr, WIDTH: tl.constexpr,
    STATE: tl.constexpr,
):  # fmt: skip
    head, side, place = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    all_heads, chunks = tl.num_programs(0), tl.cdiv(length, chunk)
    b, c, group = place // chunks, place % chunks, head // heads
    start = c * chunk
    left = tl.minimum(chunk, length - start)
    j, p, n = side * SIDE + tl.arange(0, SIDE), tl.arange(0, WIDTH), tl.arange(0, STATE)
    at = ((b * all_heads + head) * chunks + c) * chunk
    b_long, start_long = b.to(tl.int64), start.to(tl.int64)
    step_j = tl.load(step + at + j, mask=j < left, other=0.0)
    decay_j = tl.load(decay + at + j, mask=j < left, other=0.0) * LOG2E

    # From the state after the chunk.
    to_end = tl.exp2(tl.minimum(tl.load(decay + at + chunk - 1) * LOG2E - decay_j, 0.0))
    if HAS_SEQUENCE:
        first = sequence + b_long * length + start
        of_j = tl.load(first + j, mask=j < left, other=-1)
        to_end = tl.where(of_j == tl.load(first + left - 1), to_end, 0.0)
    b_at = b_of + b_long * b_batch + start_long * b_position + group * state
    b_j = tl.load(
        b_at + j[:, None] * b_position + n[None, :],
        mask=(j < left)[:, None] & (n < state)[None, :],
        other=0.0,
    )
    state_at = states_grad + (place.to(tl.int64) * all_heads + head) * width * state
    of_state = tl.load(
        state_at + p[None, :] * state + n[:, None],
        mask=(n < state)[:, None] & (p < width)[None, :],
        other=0.0,
    )
    total = tl.dot(b_j, of_state.to(b_j.dtype)) * to_end[:, None]

    # From the outputs of later positions of the chunk, and its own.
    grad += b_long * grad_batch + start_long * grad_position + head * width
    square = scores + (place * (all_heads // heads) + group).to(tl.int64) * chunk * chunk
    for from_i in range(side * SIDE, left, SIDE):
        i = from_i + tl.arange(0, SIDE)
        wanted = (i[None, :] >= j[:, None]) & (i < left)[None, :]
        score = tl.load(
            square + i[None, :] * chunk + j[:, None], mask=wanted & (j < left)[:, None], other=0.0
        )
        decay_i = tl.load(decay + at + i, mask=i < left, other=0.0) * LOG2E
        score *= tl.exp2(tl.minimum(decay_i[None, :] - decay_j[:, None], 0.0))
        g = tl.load(
            grad + i[:, None] * grad_position + p[None, :],
            mask=(i < left)[:, None] & (p < width)[None, :],
            other=0.0,
        )
        total += tl.dot(score.to(g.dtype), g)

    there = (j < left)[:, None] & (p < width)[None, :]
    own = tl.load(grad + j[:, None] * grad_position + p[None, :], mask=there, other=0.0).to(tl.float32)
    if WIDE_D:
        d = tl.load(d_of + head * width + p, mask=p < width, other=0.0).to(tl.float32)[None, :]
    else:
        d = tl.load(d_of + head).to(tl.float32)
    x_at = x + b_long * x_batch + start_long * x_position + head * width
    value = tl.load(x_at + j[:, None] * x_position + p[None, :], mask=there, other=0.0).to(tl.float32)
    tl.store(step_grad + at + j, tl.sum(total * value, 1), mask=j < chunk)
    out_at = out + b_long * out_batch + start_long * out_position + head * width
    tl.store(out_at + j[:, None] * out_position + p[None, :], total * step_j[:, None] + own * d, mask=there)


def x_back(
    x: Tensor,
    grad: Tensor,
    scores: Tensor,
    step: Tensor,
    decay: Tensor,
    states_grad: Tensor,
    B: Tensor,
    D: Tensor,
    sequence: Tensor | None,
    out: Tensor,
) -> Tensor:
    """The gradient of `step` where it is a factor, (b, h, c, k), in fp32; that of x is written to `out`.

    What x_j step_j gets is the sum over i >= j of scores_ij exp(decay_i - decay_j) grad_i, and the product of
    B_j and the gradient of the state after the chunk, decayed by exp(decay_end - decay_j). mamba-ssm's kernel
    sums the gradient of D too, which beside a gate nothing reads.

    Args:
        x, grad, out: (b, l, h, p), whose heads lie side by side.
        states_grad: (b, c, h, p, n), contiguous.
        B: (b, l, g, n), whose groups lie side by side.
        D: (h,) or (h, p), contiguous.
        sequence: (b, l), contiguous.
    """
    batch, length, heads, width = x.shape
    chunks, groups, chunk = scores.shape[1:4]
    state, side = B.shape[-1], min(X_SIDE, max(16, triton.next_power_of_2(chunk)))
    step_grad = torch.empty_like(step)
    _x_back[(heads, triton.cdiv(chunk, side), batch * chunks)](
        x,
        grad,
        scores,
        step,
        decay,
        states_grad,
        B,
        D,
        sequence,
        out,
        step_grad,
        length,
        chunk,
        heads // groups,
        width,
        state,
        x.stride(0),
        x.stride(1),
        grad.stride(0),
        grad.stride(1),
        B.stride(0),
        B.stride(1),
        out.stride(0),
        out.stride(1),
        sequence is not None,
        D.dim() == 2,
        side,
        max(16, triton.next_power_of_2(width)),
        max(16, triton.next_power_of_2(state)),
        num_warps=X_WARPS,
        num_stages=X_STAGES,
    )
    return step_grad


@triton.jit
def _step_back(
    sums, before, after, between, step, step_grad, raw, bias, rate, out, parts, length, chunk, heads,
    raw_batch, raw_position, out_batch, out_position, columns_at, parts_at, SIDE: tl.constexpr,
    SIDES: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    chunks = tl.cdiv(length, chunk)
    b, c = place // chunks, place % chunks
    h, k = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, CHUNK)
    left = tl.minimum(chunk, length - c * chunk)
    head_there = h < heads
    there = head_there[:, None] & (k < chunk)[None, :]
    inside = there & (k < left)[None, :]
    row = ((b * heads + h) * chunks + c).to(tl.int64)
    at = row[:, None] * chunk + k[None, :]
    # The gradient of `decay`, to be added up from the end of the chunk, and `after` from its start.
    grad = tl.load(before + at, mask=there, other=0.0)
    for side in tl.static_range(SIDES):
        part = sums + (row * SIDES + side)[:, None] * chunk + k[None, :]
        grad += tl.load(part, mask=there & (k // SIDE >= side)[None, :], other=0.0)
        grad -= tl.load(part + columns_at, mask=there & (k // SIDE <= side)[None, :], other=0.0)
    last = tl.load(between + row, mask=head_there, other=0.0)
    grad += tl.where((k == chunk - 1)[None, :], last[:, None], 0.0)
    follows = tl.load(after + at, mask=there, other=0.0)
    grad = tl.cumsum(grad, 1, reverse=True) + tl.cumsum(follows, 1)

    start = (c * chunk).to(tl.int64)
    given = raw + b.to(tl.int64) * raw_batch + (start + k)[None, :] * raw_position + h[:, None]
    d = tl.load(given, mask=inside, other=0.0).to(tl.float32)
    d += tl.load(bias + h, mask=head_there, other=0.0)[:, None]
    of_step = grad * tl.load(rate + h, mask=head_there, other=0.0)[:, None]
    of_step += tl.load(step_grad + at, mask=inside, other=0.0)
    of_raw = tl.where(inside, tl.where(d <= 20.0, of_step * tl.sigmoid(d), of_step), 0.0)
    place_out = out + b.to(tl.int64) * out_batch + (start + k)[None, :] * out_position + h[:, None]
    tl.store(place_out, of_raw, mask=inside)
    of_rate = tl.sum(grad * tl.load(step + at, mask=inside, other=0.0), 1)
    tl.store(parts + place * heads + h, of_rate, mask=head_there)
    tl.store(parts + parts_at + place * heads + h, tl.sum(of_raw, 1), mask=head_there)


def step_back(
    sums: Tensor,
    before: Tensor,
    after: Tensor,
    between: Tensor,
    step: Tensor,
    step_grad: Tensor,
    raw: Tensor,
    bias: Tensor,
    rate: Tensor,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of A and of dt's bias, (h,); that of dt as it was given is written to `out`.

    The gradient of step A at a position is the sum of that of `decay` from there to the end of the chunk.

    Args:
        sums: of `scores_back`.
        before: the gradient of `decay` from the state before the chunk, (b, h, c, k).
        after: what the position before gave to the state after the chunk, (b, h, c, k).
        between: the gradient of a chunk's whole decay, from state to state, (b, h, c).
        step_grad: the gradient of `step` where it is a factor, (b, h, c, k).
        raw, out: (b, l, h), whose heads lie side by side.
        bias, rate: (h,), in fp32; rate is A.
    """
    batch, length, heads = raw.shape
    chunks, sides, chunk = sums.shape[3:]
    parts = torch.empty(2, batch * chunks, heads, dtype=torch.float32, device=raw.device)
    block = min(HEADS, triton.next_power_of_2(heads))
    _step_back[(batch * chunks, triton.cdiv(heads, block))](
        sums,
        before,
        after,
        between,
        step,
        step_grad,
        raw,
        bias,
        rate,
        out,
        parts,
        length,
        chunk,
        heads,
        raw.stride(0),
        raw.stride(1),
        out.stride(0),
        out.stride(1),
        sums[0].numel(),
        batch * chunks * heads,
        min(SIDE, max(16, triton.next_power_of_2(chunk))),
        sides,
        triton.next_power_of_2(chunk),
        block,
        num_warps=STEP_WARPS,
    )
    of_rate, of_bias = parts.sum(1).unbind()
    return of_rate, of_bias
