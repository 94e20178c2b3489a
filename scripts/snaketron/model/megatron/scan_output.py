"""The kernel of the forward pass of Mamba-2's scan, in Triton: the output from states and scores.

Names and shapes are those of `scan_kernels`.
"""

# Triton gives the parameters of a kernel their types when it compiles it.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# The positions that a program of `_output` has, and at a time reads; its warps and stages. The heads of a
# group follow each other, since they read the same scores.
SIDE, READ, WARPS, STAGES = 64, 32, 4, 1
# e^x is computed as 2^(x log2(e)): `tl.exp` has more instructions for tiny results.
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _output(
    x, gate, scores, step, decay, states, c_of, d_of, sequence, out, ungated, length, chunk, heads, width,
    state, x_batch, x_position, gate_batch, gate_position, c_batch, c_position, out_batch, out_position,
    HAS_SEQUENCE: tl.constexpr, WIDE_D: tl.constexpr, SIDE: tl.constexpr, READ: tl.constexpr,
    WIDTH: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    head, side, place = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    all_heads, chunks = tl.num_programs(0), tl.cdiv(length, chunk)
    b, c, group = place // chunks, place % chunks, head // heads
    start = c * chunk
    left = tl.minimum(chunk, length - start)
    i, p, n = side * SIDE + tl.arange(0, SIDE), tl.arange(0, WIDTH), tl.arange(0, STATE)
    at = ((b * all_heads + head) * chunks + c) * chunk
    b_long, start_long = b.to(tl.int64), start.to(tl.int64)
    decay_i = tl.load(decay + at + i, mask=i < left, other=0.0) * LOG2E

    # From the state before the chunk.
    from_start = tl.exp2(decay_i)
    if HAS_SEQUENCE:
        first = sequence + b_long * length + start
        of_i = tl.load(first + i, mask=i < left, other=-1)
        from_start = tl.where(of_i == tl.load(first - 1, mask=c > 0, other=0), from_start, 0.0)
    c_at = c_of + b_long * c_batch + start_long * c_position + group * state
    c_i = tl.load(
        c_at + i[:, None] * c_position + n[None, :],
        mask=(i < left)[:, None] & (n < state)[None, :],
        other=0.0,
    )
    state_at = states + (place.to(tl.int64) * all_heads + head) * width * state
    before = tl.load(
        state_at + p[None, :] * state + n[:, None],
        mask=(n < state)[:, None] & (p < width)[None, :],
        other=0.0,
    )
    total = tl.dot(c_i, before.to(c_i.dtype)) * from_start[:, None]

    # From the earlier positions of the chunk, and the own one.
    x += b_long * x_batch + start_long * x_position + head * width
    square = scores + (place * (all_heads // heads) + group).to(tl.int64) * chunk * chunk
    for from_j in range(0, tl.minimum((side + 1) * SIDE, left), READ):
        j = from_j + tl.arange(0, READ)
        wanted = (j[None, :] <= i[:, None]) & (i < left)[:, None]
        score = tl.load(square + i[:, None] * chunk + j[None, :], mask=wanted, other=0.0)
        decay_j = tl.load(decay + at + j, mask=j < left, other=0.0) * LOG2E
        score *= tl.exp2(tl.minimum(decay_i[:, None] - decay_j[None, :], 0.0))
        score *= tl.load(step + at + j, mask=j < left, other=0.0)[None, :]
        value = tl.load(
            x + j[:, None] * x_position + p[None, :],
            mask=(j < left)[:, None] & (p < width)[None, :],
            other=0.0,
        )
        total += tl.dot(score.to(value.dtype), value)

    there = (i < left)[:, None] & (p < width)[None, :]
    own = tl.load(x + i[:, None] * x_position + p[None, :], mask=there, other=0.0).to(tl.float32)
    if WIDE_D:
        total += own * tl.load(d_of + head * width + p, mask=p < width, other=0.0).to(tl.float32)[None, :]
    else:
        total += own * tl.load(d_of + head).to(tl.float32)
    to = b_long * out_batch + start_long * out_position + head * width
    to += i[:, None] * out_position + p[None, :]
    tl.store(ungated + to, total, mask=there)
    gate_at = gate + b_long * gate_batch + start_long * gate_position + head * width
    z = tl.load(gate_at + i[:, None] * gate_position + p[None, :], mask=there, other=0.0).to(tl.float32)
    tl.store(out + to, total * z * tl.sigmoid(z), mask=there)


def output(
    x: Tensor,
    gate: Tensor,
    scores: Tensor,
    step: Tensor,
    decay: Tensor,
    states: Tensor,
    C: Tensor,
    D: Tensor,
    sequence: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output of the scan with its gate, and without.

    Without it, position i has the sum over j <= i of scores_ij exp(decay_i - decay_j) step_j x_j, the product
    of exp(decay_i) C_i and the state before the chunk, and D x_i.

    Args:
        x, gate: (b, l, h, p), whose heads lie side by side.
        states: (b, c, h, p, n), contiguous.
        C: (b, l, g, n), whose groups lie side by side.
        D: (h,) or (h, p), contiguous.
        sequence: (b, l), contiguous.

    Returns:
        Both (b, l, h, p), with batch and length in memory in the order of `gate`.
    """
    batch, length, heads, width = x.shape
    chunks, groups, chunk = scores.shape[1:4]
    state, side = C.shape[-1], min(SIDE, max(16, triton.next_power_of_2(chunk)))
    out, ungated = torch.empty_like(gate), torch.empty_like(gate)
    _output[(heads, triton.cdiv(chunk, side), batch * chunks)](
        x,
        gate,
        scores,
        step,
        decay,
        states,
        C,
        D,
        sequence,
        out,
        ungated,
        length,
        chunk,
        heads // groups,
        width,
        state,
        x.stride(0),
        x.stride(1),
        gate.stride(0),
        gate.stride(1),
        C.stride(0),
        C.stride(1),
        out.stride(0),
        out.stride(1),
        sequence is not None,
        D.dim() == 2,
        side,
        min(READ, side),
        max(16, triton.next_power_of_2(width)),
        max(16, triton.next_power_of_2(state)),
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return out, ungated
