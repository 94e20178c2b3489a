"""The convolution of a Mamba-2 layer before its scan, in Triton: depthwise and causal, with silu.

The output at position t is silu(p_t), where p_t is the bias and the sum over k < width of weight_k times the
input at t - width + 1 + k. An input before the row, or of another sequence than t, counts as 0.

A program walks along a stretch of positions of some channels, with the last inputs in registers, so that it
reads each number once. In causal-conv1d's backward pass the gradients of weights depend on the order in which
programs end; here they do not.
"""

# Triton gives the parameters of a kernel their types when it compiles it, and a tuple may grow in a kernel.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,assignment"
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# The channels and positions of a program of `_convolve`; the positions that it reads at a time, which divide
# them; its warps and stages.
CHANNELS, STRETCH, ROWS, WARPS, STAGES = 128, 32, 8, 1, 1
# These five numbers of `_convolve_back`.
BACK_CHANNELS, BACK_STRETCH, BACK_ROWS, BACK_WARPS, BACK_STAGES = 256, 64, 4, 4, 1
# Sums of stretches and channels that a program of `_convolve_sums` holds at a time.
ADDED_STRETCHES, ADDED_CHANNELS = 64, 32


@triton.jit
def _weights(weight, bias, channel, inside, WIDTH: tl.constexpr):
    """A tuple of the weights of each place, and the bias, of some channels in fp32."""
    found = ()
    for k in tl.static_range(WIDTH):
        w = tl.load(weight + channel * WIDTH + k, mask=inside, other=0.0)
        found += (w.to(tl.float32),)
    return found, tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _place(b, position, batch_stride, position_stride):
    return b.to(tl.int64) * batch_stride + position.to(tl.int64) * position_stride


@triton.jit
def _rows(at, stride, first, length, inside, COUNT: tl.constexpr):
    """A tuple of the rows from `first`, which lies at `at`; 0 outside of the `length` positions."""
    found = ()
    for r in tl.static_range(COUNT):
        there = (first + r >= 0) & (first + r < length)
        found += (tl.load(at + r * stride, mask=inside & there, other=0.0),)
    return found


@triton.jit
def _sequences(sequence, first, length, HAS_SEQUENCE: tl.constexpr, COUNT: tl.constexpr):
    """A tuple of the sequences of the positions from `first` on; an empty one where there are none."""
    found = ()
    if HAS_SEQUENCE:
        for r in tl.static_range(COUNT):
            there = (first + r >= 0) & (first + r < length)
            found += (tl.load(sequence + first + r, mask=there, other=-1),)
    return found


@triton.jit
def _mixed(sequences, COUNT: tl.constexpr):
    """Whether there are several: most rows that are read together are of one, and need no comparisons."""
    found = sequences[0] != sequences[1]
    for r in tl.static_range(2, COUNT):
        found = found | (sequences[0] != sequences[r])
    return found


@triton.jit
def _fp32(rows, COUNT: tl.constexpr):
    found = ()
    for r in tl.static_range(COUNT):
        found += (rows[r].to(tl.float32),)
    return found


@triton.jit
def _of_sequence(
    rows, sequences, FIRST: tl.constexpr, OWN: tl.constexpr, MIXED: tl.constexpr, COUNT: tl.constexpr
):
    """The rows, whose sequences begin at `FIRST` in the tuple, with 0 for those of another than `OWN`."""
    found = rows
    if MIXED:
        found = ()
        for r in tl.static_range(COUNT):
            found += (tl.where(sequences[FIRST + r] == sequences[OWN], rows[r], 0.0),)
    return found


@triton.jit
def _sum(rows, weights, total, COUNT: tl.constexpr):
    for k in tl.static_range(COUNT):
        total += rows[k] * weights[k]
    return total


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)), without the division and the small numbers of `exp`: half of the instructions."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))  # -log2(e)
    return root * root


@triton.jit
def _silu_back(x, grad):
    sigmoid = _sigmoid(x)
    return grad * (sigmoid * (1.0 + (x - x * sigmoid)))


@triton.jit
def _walk(
    inputs, xs, of, weights, bias, out, out_position, first, length, inside, MIXED: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Walks over the rows `xs`, and writes their convolution; it returns the last inputs."""
    for r in tl.static_range(ROWS):
        inputs += (xs[r].to(tl.float32),)
        total = _sum(_of_sequence(inputs, of, r, r + WIDTH - 1, MIXED, WIDTH), weights, bias, WIDTH)
        tl.store(out + r * out_position, total * _sigmoid(total), mask=inside & (first + r < length))
        inputs = inputs[1:]
    return inputs


@triton.jit
def _convolve(
    x, weight, bias, sequence, out, length, channels, x_batch, x_position, out_batch, out_position,
    UNIT: tl.constexpr, HAS_SEQUENCE: tl.constexpr, WIDTH: tl.constexpr, STRETCH: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    BEFORE: tl.constexpr = WIDTH - 1
    x_batch, x_position = x_batch * UNIT, x_position * UNIT
    out_batch, out_position = out_batch * UNIT, out_position * UNIT
    b, start = tl.program_id(2), tl.program_id(1) * STRETCH
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    x += _place(b, start, x_batch, x_position) + channel
    out += _place(b, start, out_batch, out_position) + channel
    if HAS_SEQUENCE:
        sequence += b.to(tl.int64) * length
    weights, own_bias = _weights(weight, bias, channel, inside, WIDTH)
    before = start - BEFORE
    inputs = _fp32(_rows(x - BEFORE * x_position, x_position, before, length, inside, BEFORE), BEFORE)
    last = _sequences(sequence, before, length, HAS_SEQUENCE, BEFORE)
    for first in tl.range(start, tl.minimum(start + STRETCH, length), ROWS, num_stages=STAGES):
        xs = _rows(x, x_position, first, length, inside, ROWS)
        of = last + _sequences(sequence, first, length, HAS_SEQUENCE, ROWS)
        to = (weights, own_bias, out, out_position, first, length, inside)
        if HAS_SEQUENCE:
            last = of[ROWS:]
            if _mixed(of, BEFORE + ROWS):
                inputs = _walk(inputs, xs, of, *to, True, WIDTH, ROWS)
            else:
                inputs = _walk(inputs, xs, of, *to, False, WIDTH, ROWS)
        else:
            inputs = _walk(inputs, xs, of, *to, False, WIDTH, ROWS)
        x += ROWS * x_position
        out += ROWS * out_position


@triton.jit
def _walk_back(
    inputs, grads, weights_grad, bias_grad, xs, gs, of, weights, bias, out, out_position, place, length,
    inside, MIXED: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Walks over the rows `xs` and their gradients `gs`, and writes the gradients of rows from `place` on.

    It returns the last inputs, the last gradients of p, and the sums.
    """
    BEFORE: tl.constexpr = WIDTH - 1
    for r in tl.static_range(ROWS):
        inputs += (xs[r].to(tl.float32),)
        read = _of_sequence(inputs, of, r, r + BEFORE, MIXED, WIDTH)
        own = _silu_back(_sum(read, weights, bias, WIDTH), gs[r].to(tl.float32))
        bias_grad += own
        grads += (own,)
        added = ()
        for k in tl.static_range(WIDTH):
            added += (weights_grad[k] + own * read[k],)
        weights_grad = added
        total = _sum(_of_sequence(grads, of, r, r, MIXED, WIDTH), weights[::-1], tl.zeros_like(own), WIDTH)
        there = (place + r >= 0) & (place + r < length)
        tl.store(out + r * out_position, total, mask=inside & there)
        inputs, grads = inputs[1:], grads[1:]
    return inputs, grads, weights_grad, bias_grad


@triton.jit
def _convolve_back(
    x, weight, bias, grad, sequence, out, sums, length, channels, x_batch, x_position, grad_batch,
    grad_position, out_batch, out_position, UNIT: tl.constexpr, HAS_SEQUENCE: tl.constexpr,
    WIDTH: tl.constexpr, STRETCH: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    # With the gradient of p_t the program has all of that of x_{t - BEFORE}.
    BEFORE: tl.constexpr = WIDTH - 1
    x_batch, x_position = x_batch * UNIT, x_position * UNIT
    grad_batch, grad_position = grad_batch * UNIT, grad_position * UNIT
    out_batch, out_position = out_batch * UNIT, out_position * UNIT
    b, part, stretches = tl.program_id(2), tl.program_id(1), tl.num_programs(1)
    start = part * STRETCH
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < channels
    x += _place(b, start, x_batch, x_position) + channel
    grad += _place(b, start, grad_batch, grad_position) + channel
    out += _place(b, start - BEFORE, out_batch, out_position) + channel
    if HAS_SEQUENCE:
        sequence += b.to(tl.int64) * length
    weights, own_bias = _weights(weight, bias, channel, inside, WIDTH)

    # The inputs before the stretch, and the gradients of p there.
    before = start - 2 * BEFORE
    early = _rows(x - 2 * BEFORE * x_position, x_position, before, length, inside, 2 * BEFORE)
    early_grad = _rows(grad - BEFORE * grad_position, grad_position, start - BEFORE, length, inside, BEFORE)
    last = _sequences(sequence, before, length, HAS_SEQUENCE, 2 * BEFORE)
    inputs, grads = _fp32(early[:BEFORE], BEFORE), ()
    for r in tl.static_range(BEFORE):
        inputs += (early[BEFORE + r].to(tl.float32),)
        read = _of_sequence(inputs, last, r, r + BEFORE, HAS_SEQUENCE, WIDTH)
        total = _sum(read, weights, own_bias, WIDTH)
        grads += (_silu_back(total, early_grad[r].to(tl.float32)),)
        inputs = inputs[1:]
    last = last[BEFORE:]

    zero = tl.zeros([CHANNELS], tl.float32)
    state = (inputs, grads, (zero,) * WIDTH, zero)
    end = tl.minimum(start + STRETCH, length + BEFORE)
    for first in tl.range(start, end, ROWS, num_stages=STAGES):
        xs = _rows(x, x_position, first, length, inside, ROWS)
        gs = _rows(grad, grad_position, first, length, inside, ROWS)
        of = last + _sequences(sequence, first, length, HAS_SEQUENCE, ROWS)
        to = (weights, own_bias, out, out_position, first - BEFORE, length, inside)
        if HAS_SEQUENCE:
            last = of[ROWS:]
            if _mixed(of, BEFORE + ROWS):
                state = _walk_back(*state, xs, gs, of, *to, True, WIDTH, ROWS)
            else:
                state = _walk_back(*state, xs, gs, of, *to, False, WIDTH, ROWS)
        else:
            state = _walk_back(*state, xs, gs, of, *to, False, WIDTH, ROWS)
        x += ROWS * x_position
        grad += ROWS * grad_position
        out += ROWS * out_position

    sums += (b * stretches + part).to(tl.int64) * (WIDTH + 1) * channels + channel
    for k in tl.static_range(WIDTH):
        tl.store(sums + k * channels, state[2][k], mask=inside)
    tl.store(sums + WIDTH * channels, state[3], mask=inside)


@triton.jit
def _convolve_sums(
    sums, weight_grad, bias_grad, count, channels, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    k, channel = tl.program_id(1), tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in range(0, count, ROWS):
        part = start + tl.arange(0, ROWS)
        at = (part.to(tl.int64) * (WIDTH + 1) + k)[:, None] * channels + channel[None, :]
        total += tl.load(sums + at, mask=(part < count)[:, None] & (channel < channels)[None, :], other=0.0)
    if k < WIDTH:
        tl.store(weight_grad + channel * WIDTH + k, tl.sum(total, 0), mask=channel < channels)
    else:
        tl.store(bias_grad + channel, tl.sum(total, 0), mask=channel < channels)


def _strides(*tensors: Tensor) -> list[int]:
    """The strides of batch and position of each tensor in a unit, and the unit.

    So Triton knows where rows begin at multiples of 16 bytes. By itself it sees multiples of 16 numbers, and
    rows of Nano's layer on eight GPUs have 1,288.
    """
    strides = [tensor.stride(axis) for tensor in tensors for axis in (0, 1)]
    unit = math.gcd(8, *strides)
    return [*(stride // unit for stride in strides), unit]


def convolve(x: Tensor, weight: Tensor, bias: Tensor, sequence: Tensor | None) -> Tensor:
    """The convolution with silu.

    Args:
        x: (batch, length, channels), whose channels lie side by side.
        weight, bias: (channels, width) and (channels,), contiguous.
        sequence: of each position, int32 (batch, length), contiguous; None: one in each row.

    Returns:
        As `x`, with batch and length in memory in the order of `x`.
    """
    batch, length, channels = x.shape
    out = torch.empty_like(x)
    _convolve[(triton.cdiv(channels, CHANNELS), triton.cdiv(length, STRETCH), batch)](
        x,
        weight,
        bias,
        sequence,
        out,
        length,
        channels,
        *_strides(x, out),
        sequence is not None,
        weight.shape[1],
        STRETCH,
        ROWS,
        CHANNELS,
        STAGES,
        num_warps=WARPS,
    )
    return out


def convolve_back(
    x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, sequence: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of `weight` and `bias`; that of `x`, shaped as `x`, is written to `out`.

    The former are added up in fp32 in an order that depends only on the shape.

    Args:
        grad: of the output, shaped as `x`; its channels, and those of `out`, lie side by side.
    """
    (batch, length, channels), width = x.shape, weight.shape[1]
    stretches = triton.cdiv(length + width - 1, BACK_STRETCH)
    sums = x.new_empty(batch * stretches, width + 1, channels, dtype=torch.float32)
    _convolve_back[(triton.cdiv(channels, BACK_CHANNELS), stretches, batch)](
        x,
        weight,
        bias,
        grad,
        sequence,
        out,
        sums,
        length,
        channels,
        *_strides(x, grad, out),
        sequence is not None,
        width,
        BACK_STRETCH,
        BACK_ROWS,
        BACK_CHANNELS,
        BACK_STAGES,
        num_warps=BACK_WARPS,
    )
    weight_grad, bias_grad = torch.empty_like(weight), torch.empty_like(bias)
    programs = (triton.cdiv(channels, ADDED_CHANNELS), width + 1)
    _convolve_sums[programs](
        sums, weight_grad, bias_grad, len(sums), channels, width, ADDED_STRETCHES, ADDED_CHANNELS
    )
    return weight_grad, bias_grad
