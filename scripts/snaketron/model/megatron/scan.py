"""Convolution, scan and gate of a Mamba-2 layer on a GPU.

The kernels are those of `scan_convolution`, `scan_states`, `scan_output`, `scan_kernels` and `scan_groups`,
and some of mamba-ssm.

mamba-ssm's own function computes in its backward pass again what the forward pass had: the convolution, the
states of chunks and their sums. This one keeps them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from snaketron.model.megatron import scan_convolution, scan_groups, scan_kernels, scan_output, scan_states

import torch
from mamba_ssm.ops.triton.ssd_bmm import _bmm_chunk_fwd
from mamba_ssm.ops.triton.ssd_chunk_scan import _chunk_scan_bwd_dz
from mamba_ssm.ops.triton.ssd_chunk_state import _chunk_cumsum_fwd
from torch import Tensor


class Sizes(NamedTuple):
    """Sizes of a scan. Shapes are written with b batch, l length, h heads, p width, g groups, n state."""

    chunk: int  # positions of a chunk
    heads: int
    width: int  # of a head
    groups: int
    state: int

    def parts(self, zxbcdt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z, (b, l, h, p); x, B and C side by side; dt, (b, l, h). Views."""
        inner = self.heads * self.width
        z, xbc, dt = zxbcdt.split([inner, inner + 2 * self.groups * self.state, self.heads], -1)
        return z.unflatten(-1, (self.heads, self.width)), xbc, dt

    def of_convolution(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, (b, l, h, p), B and C, (b, l, g, n). Views."""
        both = self.groups * self.state
        x, b, c = xbc.split([self.heads * self.width, both, both], -1)
        shape = (self.groups, self.state)
        return x.unflatten(-1, (self.heads, self.width)), b.unflatten(-1, shape), c.unflatten(-1, shape)


class Forward(NamedTuple):
    """What the forward pass computes before its output; the backward pass needs it."""

    xbc: Tensor  # after the convolution, (b, l, channels)
    step: Tensor  # dt after softplus, (b, h, c, k), fp32
    decay: Tensor  # the sum of dt A since the start of a chunk, (b, h, c, k), fp32
    states: Tensor  # before each chunk, (b, c, h, p, n)


def _compute(
    sizes: Sizes,
    zxbcdt: Tensor,
    weight: Tensor,
    bias: Tensor,
    dt_bias: Tensor,
    rate: Tensor,
    sequence: Tensor | None,
) -> Forward:
    _, given, dt = sizes.parts(zxbcdt)
    xbc = scan_convolution.convolve(given, weight, bias, sequence)
    x, b, _ = sizes.of_convolution(xbc)
    decay, step = _chunk_cumsum_fwd(dt, rate, sizes.chunk, dt_bias=dt_bias, dt_softplus=True)
    # In the type of the model; mamba-ssm's backward pass has them in fp32, which matters for the gradient of
    # a chunk's whole decay alone.
    return Forward(xbc, step, decay, scan_states.states(x, b, step, decay, sequence))


class Scan(torch.autograd.Function):
    """silu(z) * (scan(dt, A, B, C, x) + D x), x, B and C after convolution and silu; without a norm.

    Batch and length may have either order in memory, and the gradient of `zxbcdt` has the one of `zxbcdt`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        zxbcdt: Tensor,
        weight: Tensor,
        bias: Tensor,
        dt_bias: Tensor,
        rate: Tensor,
        D: Tensor,
        sequence: Tensor | None,
        chunk: int,
        width: int,
        groups: int,
        keep: bool,
    ) -> Tensor:
        """The gated output.

        Args:
            zxbcdt: (batch, length, 2 * inner + 2 * groups * state + heads).
            weight, bias: of the convolution, (channels, its length) and (channels,), for x, B and C;
                contiguous.
            dt_bias, rate: (heads,) in fp32; rate is A.
            D: (heads,), or (heads, width) in fp32.
            sequence: of each position, int32 (batch, length); None: one in each row.
            chunk: positions of a chunk.
            width: of a head.
            groups: of heads with the same B and C.
            keep: whether the backward pass finds what the forward pass computed, or computes it again.

        Returns:
            (batch, length, inner).
        """
        heads = len(D)
        sizes = Sizes(chunk, heads, width, groups, (len(weight) - heads * width) // groups // 2)
        sequence = None if sequence is None else sequence.contiguous()
        found = _compute(sizes, zxbcdt, weight, bias, dt_bias, rate, sequence)
        x, b, c = sizes.of_convolution(found.xbc)
        scores = _bmm_chunk_fwd(c, b, chunk, seq_idx=sequence, output_dtype=torch.float32)
        gate = sizes.parts(zxbcdt)[0]
        shared = (scores, found.step, found.decay, found.states)
        out, ungated = scan_output.output(x, gate, *shared, c, D, sequence)
        kept = found if keep else ()
        ctx.save_for_backward(zxbcdt, weight, bias, dt_bias, rate, D, sequence, ungated, *kept)
        ctx.sizes = sizes
        return out.flatten(-2)

    @staticmethod
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        zxbcdt, weight, bias, dt_bias, rate, D, sequence, ungated, *kept = ctx.saved_tensors
        sizes: Sizes = ctx.sizes
        found = Forward(*kept) if kept else _compute(sizes, zxbcdt, weight, bias, dt_bias, rate, sequence)
        gate, given, dt = sizes.parts(zxbcdt)
        x = sizes.of_convolution(found.xbc)[0]
        zxbcdt_grad, xbc_grad = torch.empty_like(zxbcdt), torch.empty_like(given)
        gate_grad, given_grad, dt_grad = sizes.parts(zxbcdt_grad)
        grad = out_grad if out_grad.stride(-1) == 1 else out_grad.contiguous()
        _, grad, D_grad = _chunk_scan_bwd_dz(
            x,
            gate,
            ungated,
            grad.unflatten(-1, ungated.shape[-2:]),
            chunk_size=sizes.chunk,
            has_ddAcs=False,
            D=D,
            dz=gate_grad,
        )
        rate_grad, dt_bias_grad = _scan_back(
            sizes, found, grad, (dt, dt_bias, rate, D, sequence), dt_grad, xbc_grad
        )
        weight_grad, bias_grad = scan_convolution.convolve_back(
            given, weight, bias, xbc_grad, sequence, given_grad
        )
        grads = (zxbcdt_grad, weight_grad, bias_grad, dt_bias_grad, rate_grad, D_grad)
        return *grads, *[None] * 5


def _scan_back(
    sizes: Sizes,
    found: Forward,
    grad: Tensor,
    given: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    dt_grad: Tensor,
    xbc_grad: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of A and of dt's bias; those of dt and of x, B and C are written to their places.

    Args:
        grad: of the output before the gate, (b, l, h, p).
        given: dt, its bias, A, D and the sequences.
    """
    dt, dt_bias, rate, D, sequence = given
    (x, b, c), (x_grad, b_grad, c_grad) = (sizes.of_convolution(t) for t in (found.xbc, xbc_grad))
    step, decay = found.step, found.decay
    scores = _bmm_chunk_fwd(c, b, sizes.chunk, seq_idx=sequence, output_dtype=torch.float32)
    states_grad, between = scan_states.states_back(grad, c, decay, found.states, sequence)
    step_grad = scan_kernels.x_back(x, grad, scores, step, decay, states_grad, b, D, sequence, x_grad)
    scores_grad, sums = scan_kernels.scores_back(x, grad, scores, step, decay, sequence)
    shared = (scores_grad, step, decay, sequence)
    after = scan_groups.group_back(x, states_grad, b, c, *shared, b_grad, after=True)
    before = scan_groups.group_back(grad, found.states, c, b, *shared, c_grad, after=False)
    return scan_kernels.step_back(sums, before, after, between, step, step_grad, dt, dt_bias, rate, dt_grad)
