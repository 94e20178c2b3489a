"""The kernel of Mamba-2's scan that goes from chunk to chunk, in Triton: states, and their gradients.

Names and shapes are those of `scan_kernels`.
"""

# Triton gives the parameters of a kernel their types when it compiles it.
# mypy: disable-error-code="no-untyped-def,no-untyped-call"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# The largest part of a head's state that a program has, its warps and stages, and the positions that it reads
# at a time (half of them in fp32): (p, n) of the forward pass, and (n, p) of the backward pass.
TILE, WARPS, STAGES, READ = (64, 64), 4, 3, 128
BACK_TILE, BACK_WARPS, BACK_STAGES, BACK_READ = (128, 64), 8, 3, 128
# As many programs fill a GPU; where there are few heads, parts have fewer columns until there are as many.
# They keep their rows, since the H200's fast products have 64.
PROGRAMS = 128


@triton.jit
def _carry(
    values, given, step, decay, states, sequence, out, between, length, chunk, heads, width, state,
    values_batch, values_position, given_batch, given_position, BACK: tl.constexpr,
    HAS_SEQUENCE: tl.constexpr, WHOLE: tl.constexpr, READ: tl.constexpr, READS: tl.constexpr,
    WIDTH: tl.constexpr, STATE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    index, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    all_heads, chunks, across = tl.num_programs(1), tl.cdiv(length, chunk), tl.cdiv(state, STATE)
    p = index // across * WIDTH + tl.arange(0, WIDTH)
    n = index % across * STATE + tl.arange(0, STATE)
    there = (p < width)[:, None] & (n < state)[None, :]
    total = tl.zeros([STATE, WIDTH] if BACK else [WIDTH, STATE], tl.float32)
    for turn in tl.range(0, chunks * READS, num_stages=STAGES):
        c = chunks - 1 - turn // READS if BACK else turn // READS
        begins = turn % READS == 0
        start = c * chunk
        left = tl.minimum(chunk, length - start)
        k = turn % READS * READ + tl.arange(0, READ)
        inside = (k < left) | WHOLE  # a comparison less where all chunks are whole
        row = (b * all_heads + head) * chunks + c
        scale = tl.load(decay + row * chunk + k, mask=inside, other=0.0)
        end = tl.load(decay + row * chunk + chunk - 1)
        if BACK:
            scale = tl.exp(scale)
        else:
            scale = tl.exp(tl.minimum(end - scale, 0.0))
            scale *= tl.load(step + row * chunk + k, mask=inside, other=0.0)
        keep = tl.exp(end)
        if HAS_SEQUENCE:
            first = sequence + b * length + start
            of_k = tl.load(first + k, mask=inside, other=-1)
            before, last = tl.load(first - 1, mask=c > 0, other=0), tl.load(first + left - 1)
            scale = tl.where(of_k == (before if BACK else last), scale, 0.0)
            keep = tl.where(before == last, keep, 0.0)

        place = ((b * chunks + c) * all_heads + head) * width * state
        at = p[:, None] * state + n[None, :]
        carried = total.T if BACK else total
        tl.store(out + place + at, carried, mask=there & begins)
        if BACK:
            known = tl.load(states + place + at, mask=there & begins, other=0.0).to(tl.float32)
            part = between + index * tl.num_programs(2) * all_heads * chunks + row
            tl.store(part, keep * tl.sum(carried * known), mask=begins)

        position = start.to(tl.int64)
        value_at = values + b * values_batch + position * values_position + head * width
        value = tl.load(
            value_at + (k[:, None] * values_position + p[None, :]),
            mask=inside[:, None] & (p < width)[None, :],
            other=0.0,
        )
        other_at = given + b * given_batch + position * given_position + head // heads * state
        other = tl.load(
            other_at + (k[:, None] * given_position + n[None, :]),
            mask=inside[:, None] & (n < state)[None, :],
            other=0.0,
        )
        total *= tl.where(begins, keep, 1.0)
        # The factor that is scaled comes second: it is read from shared memory after its rounding.
        if BACK:
            total = tl.dot(other.T, (value.to(tl.float32) * scale[:, None]).to(value.dtype), total)
        else:
            total = tl.dot(value.T, (other.to(tl.float32) * scale[:, None]).to(value.dtype), total)


def tile(largest: tuple[int, int], rows: int, columns: int, heads: int) -> tuple[int, int]:
    """The rows and columns that a program has of a head's state; `heads` are those of all rows of a batch."""
    row, column = (
        min(part, max(16, triton.next_power_of_2(size)))
        for part, size in zip(largest, (rows, columns), strict=True)
    )
    while heads * triton.cdiv(rows, row) * triton.cdiv(columns, column) < PROGRAMS and column > 16:
        column //= 2
    return row, column


def states(x: Tensor, B: Tensor, step: Tensor, decay: Tensor, sequence: Tensor | None) -> Tensor:
    """The state before each chunk, (b, c, h, p, n), in the type of x.

    The first is 0, and the next is exp(decay_end) times this one and the sum over the chunk's positions of
    exp(decay_end - decay_k) step_k x_k B_k. A state is of one sequence, that of the last position before it:
    nothing else is added to it, and it ends at a chunk whose last position is of another. mamba-ssm has a
    kernel for what a chunk adds and one for the sums, with 4 bytes a number between them.

    Args:
        x: (b, l, h, p), whose heads lie side by side.
        B: (b, l, g, n), whose groups lie side by side.
        sequence: (b, l), contiguous.
    """
    batch, _, heads, width = x.shape
    state = B.shape[-1]
    out = x.new_empty(batch, step.shape[2], heads, width, state)
    part = tile(TILE, width, state, batch * heads)
    _start(x, B, step, decay, None, sequence, out, None, part, (READ, WARPS, STAGES))
    return out


def states_back(
    grad: Tensor, C: Tensor, decay: Tensor, states: Tensor, sequence: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient of the state after each chunk, and that of `decay` from state to state.

    The former is 0 after the last chunk. Before a chunk it is exp(decay_end) times that after it, and the sum
    over the chunk's positions of exp(decay_k) grad_k C_k, within sequences as in `states`. The latter is the
    sum over p and n of exp(decay_end), the state before the chunk and the gradient of the one after it,
    multiplied.

    Args:
        grad: of the output, (b, l, h, p), whose heads lie side by side.
        C: (b, l, g, n), whose groups lie side by side.
        states: before each chunk, (b, c, h, p, n), contiguous.
        sequence: (b, l), contiguous.

    Returns:
        (b, c, h, p, n) in the type of `states`, and (b, h, c) in fp32.
    """
    batch, chunks, heads, width, state = states.shape
    n, p = tile(BACK_TILE, state, width, batch * heads)
    tiles = triton.cdiv(width, p) * triton.cdiv(state, n)
    between = torch.empty(tiles, batch, heads, chunks, dtype=torch.float32, device=grad.device)
    out = torch.empty_like(states)
    sizes = (BACK_READ, BACK_WARPS, BACK_STAGES)
    _start(grad, C, None, decay, states, sequence, out, between, (p, n), sizes)
    return out, between.sum(0)


def _start(
    values: Tensor,
    given: Tensor,
    step: Tensor | None,
    decay: Tensor,
    states: Tensor | None,
    sequence: Tensor | None,
    out: Tensor,
    between: Tensor | None,
    part: tuple[int, int],
    sizes: tuple[int, int, int],
) -> None:
    """`states` where there are none, and `states_back`."""
    batch, length, heads, width = values.shape
    groups, state = given.shape[2:]
    chunk, (read, warps, stages) = decay.shape[-1], sizes
    read = min(read * 2 // values.element_size(), max(16, triton.next_power_of_2(chunk)))
    _carry[(triton.cdiv(width, part[0]) * triton.cdiv(state, part[1]), heads, batch)](
        values,
        given,
        step,
        decay,
        states,
        sequence,
        out,
        between,
        length,
        chunk,
        heads // groups,
        width,
        state,
        values.stride(0),
        values.stride(1),
        given.stride(0),
        given.stride(1),
        states is not None,
        sequence is not None,
        length % chunk == 0 and chunk % read == 0,
        read,
        triton.cdiv(chunk, read),
        *part,
        stages,
        num_warps=warps,
    )
