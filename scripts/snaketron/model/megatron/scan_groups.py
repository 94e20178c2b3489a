"""Kernels of the backward pass of Mamba-2's scan that sum over the heads of a group: gradients of B and C.

Names and shapes are those of `scan_kernels`.
"""

# Triton gives the parameters of a kernel their types when it compiles it.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# The positions that a program of `_group_back` has, its warps and stages.
GROUP_SIDE, GROUP_WARPS, GROUP_STAGES = 64, 4, 3


@triton.jit
def _group_back(
    values, states, given, other, scores_grad, step, decay, sequence, out, sums, length, chunk, heads, width,
    state, values_batch, values_position, given_batch, given_position, out_batch, out_position,
    AFTER: tl.constexpr, HAS_SEQUENCE: tl.constexpr, SIDE: tl.constexpr, WIDTH: tl.constexpr,
    STATE: tl.constexpr,
):  # fmt: skip
    side, place, group, groups = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    chunks = tl.cdiv(length, chunk)
    b, c = place // chunks, place % chunks
    start = c * chunk
    left = tl.minimum(chunk, length - start)
    b_long, start_long = b.to(tl.int64), start.to(tl.int64)
    i, p, n = side * SIDE + tl.arange(0, SIDE), tl.arange(0, WIDTH), tl.arange(0, STATE)
    there = (i < left)[:, None] & (n < state)[None, :]
    given_at = b_long * given_batch + start_long * given_position + group * state
    own = tl.load(given + given_at + i[:, None] * given_position + n[None, :], mask=there, other=0.0)
    if HAS_SEQUENCE:
        first = sequence + b_long * length + start
        of_i = tl.load(first + i, mask=i < left, other=-1)
        same = of_i == (tl.load(first + left - 1) if AFTER else tl.load(first - 1, mask=c > 0, other=0))
    values += b_long * values_batch + start_long * values_position + group * heads * width
    value_at = values + i[:, None] * values_position + p[None, :]
    value_there = (i < left)[:, None] & (p < width)[None, :]
    states += (place.to(tl.int64) * groups + group) * heads * width * state
    state_at = states + p[:, None] * state + n[None, :]
    state_there = (p < width)[:, None] & (n < state)[None, :]
    total = tl.zeros([SIDE, STATE], tl.float32)
    for h in range(heads):
        at = ((b * groups * heads + group * heads + h) * chunks + c) * chunk
        v = tl.load(value_at + h * width, mask=value_there, other=0.0)
        s = tl.load(state_at + h * width * state, mask=state_there, other=0.0)
        product = tl.dot(v, s.to(v.dtype))
        scale = tl.load(decay + at + i, mask=i < left, other=0.0)
        if AFTER:
            scale = tl.exp(tl.minimum(tl.load(decay + at + chunk - 1) - scale, 0.0))
            scale *= tl.load(step + at + i, mask=i < left, other=0.0)
        else:
            scale = tl.exp(scale)
        if HAS_SEQUENCE:
            scale = tl.where(same, scale, 0.0)
        product *= scale[:, None]
        total += product
        found = tl.sum(product * own.to(tl.float32), 1)
        if AFTER:
            tl.store(sums + at + 1 + i, found, mask=i < chunk - 1)
            tl.store(sums + at + i, tl.zeros([SIDE], tl.float32), mask=i == 0)
        else:
            tl.store(sums + at + i, found, mask=i < chunk)
    square = scores_grad + (place * groups + group).to(tl.int64) * chunk * chunk
    begin = 0
    end = tl.minimum((side + 1) * SIDE, left)
    if AFTER:
        begin = side * SIDE
        end = left
    for from_j in range(begin, end, SIDE):
        j = from_j + tl.arange(0, SIDE)
        if AFTER:
            score_at = square + j[None, :] * chunk + i[:, None]
        else:
            score_at = square + i[:, None] * chunk + j[None, :]
        score = tl.load(score_at, mask=(i < left)[:, None] & (j < left)[None, :], other=0.0)
        o = tl.load(
            other + given_at + j[:, None] * given_position + n[None, :],
            mask=(j < left)[:, None] & (n < state)[None, :],
            other=0.0,
        )
        total += tl.dot(score, o)
    out_at = out + b_long * out_batch + start_long * out_position + group * state
    tl.store(out_at + i[:, None] * out_position + n[None, :], total, mask=there)


def group_back(
    values: Tensor,
    states: Tensor,
    given: Tensor,
    other: Tensor,
    scores_grad: Tensor,
    step: Tensor,
    decay: Tensor,
    sequence: Tensor | None,
    out: Tensor,
    *,
    after: bool,
) -> Tensor:
    """The gradient of C (of B where `after`) is written to `out`; what it gives to that of `decay`.

    C_i gets the sum over the heads of its group of exp(decay_i) grad_i S, of the state S before the chunk,
    and that over j of scores_grad_ij B_j. B_i gets the sum of step_i exp(decay_end - decay_i) x_i S', of the
    gradient S' of the state after the chunk, and that over j of scores_grad_ji C_j.

    Args:
        values: the gradient of the output (x where `after`), (b, l, h, p), whose heads lie side by side.
        states: before each chunk (the gradient of those after it), (b, c, h, p, n), contiguous.
        given, other, out: C, B and the gradient of C (the other way round where `after`), (b, l, g, n), whose
            groups lie side by side; `given` and `other` have the same strides.
        scores_grad: (b, c, g, k, k), 0 above the diagonal.
        sequence: (b, l), contiguous.

    Returns:
        `before` (`after`) of `step_back`, (b, h, c, k).
    """
    batch, length, heads, width = values.shape
    chunks, groups, chunk = scores_grad.shape[1:4]
    state, side = given.shape[-1], min(GROUP_SIDE, max(16, triton.next_power_of_2(chunk)))
    sums = torch.empty_like(decay)
    _group_back[(triton.cdiv(chunk, side), batch * chunks, groups)](
        values,
        states,
        given,
        other,
        scores_grad,
        step,
        decay,
        sequence,
        out,
        sums,
        length,
        chunk,
        heads // groups,
        width,
        state,
        values.stride(0),
        values.stride(1),
        given.stride(0),
        given.stride(1),
        out.stride(0),
        out.stride(1),
        after,
        sequence is not None,
        side,
        max(16, triton.next_power_of_2(width)),
        max(16, triton.next_power_of_2(state)),
        num_warps=GROUP_WARPS,
        num_stages=GROUP_STAGES,
    )
    return sums
