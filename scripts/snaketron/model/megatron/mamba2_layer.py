"""A Mamba-2 layer between its projections, for trainings on a CPU: one autograd function.

It computes what `mamba2` describes, with the gradients written out. With those of autograd, over some forty
tensors as large as the input, a layer took 16 ms for 1,024 tokens instead of 12.
"""

from __future__ import annotations

from typing import Any

from snaketron.model.megatron import mamba2
from snaketron.model.megatron.mamba2 import by_chunk

import torch
import torch.nn.functional as F
from torch import Tensor

_silu_backward = torch.ops.aten.silu_backward.grad_input


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    seq_idx: Tensor | None = None,
    activation: str = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor:
    """mamba-ssm's fused kernel, for the arguments that megatron-core passes (no norm, no projection).

    Args:
        zxbcdt: (batch, length, 2 * inner + 2 * groups * state_dim + heads), z x B C dt side by side.
        conv1d_weight, conv1d_bias: (channels, width) and (channels,), channels = those of x B C.
        dt_bias, A, D: (heads,).
        chunk_size: of the GPU kernel; here it is `mamba2.CHUNK_SIZE`, which changes nothing but speed.
        seq_idx: (batch, length) as in `mamba2.convolve`.
        headdim: width of a head, inner / heads.

    Returns:
        (batch, length, inner), of zxbcdt's type; computed in float32 (float64 for float64).
    """
    if headdim is None or activation != "silu":
        raise ValueError(f"only headdim given and silu are supported, not {headdim} and {activation}")
    work = torch.promote_types(zxbcdt.dtype, torch.float32)
    length = zxbcdt.shape[1]
    pad = -length % mamba2.CHUNK_SIZE
    if pad:  # after the end, where it changes nothing before
        zxbcdt = F.pad(zxbcdt, (0, 0, 0, pad))
        seq_idx = None if seq_idx is None else torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, pad)], 1)
    parameters = (t.to(work) for t in (conv1d_weight, conv1d_bias, dt_bias, A, D))
    y = _Layer.apply(zxbcdt.to(work), *parameters, seq_idx, ngroups)
    return y[:, :length].to(zxbcdt.dtype)


class _Layer(torch.autograd.Function):
    """Names and shapes are those of `mamba2.scan_chunks`."""

    @staticmethod
    def forward(
        ctx: Any,
        zxbcdt: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor,
        dt_bias: Tensor,
        A: Tensor,
        D: Tensor,
        seq_idx: Tensor | None,
        groups: int,
    ) -> Tensor:
        """`zxbcdt` (batch, a multiple of `CHUNK_SIZE`, width); the rest as above, all of one type."""
        heads, channels = len(A), len(conv_bias)
        inner = zxbcdt.shape[-1] - channels - heads
        head_dim, state_dim = inner // heads, (channels - inner) // groups // 2
        z, xbc, dt_in = zxbcdt.split([inner, channels, heads], -1)
        conv = mamba2.convolve(xbc, conv_weight, conv_bias, seq_idx)
        x, B, C = F.silu(conv).split([inner, groups * state_dim, groups * state_dim], -1)
        x, B, C = (
            by_chunk(x, head_dim),
            by_chunk(B, state_dim).contiguous(),
            by_chunk(C, state_dim).contiguous(),
        )
        dt = by_chunk(F.softplus(dt_in + dt_bias), 1).contiguous()  # b c h l 1
        y, _, parts = mamba2.scan_chunks(x, dt, A, B, C, seq_idx, None)
        y = torch.addcmul(y, x, D.view(-1, 1, 1)).transpose(2, 3).reshape(len(z), -1, inner)
        ctx.save_for_backward(
            zxbcdt, conv_weight, dt_bias, A, D, seq_idx, conv, x, B, C, dt, *parts, y
        )  # fmt: skip
        return y * F.silu(z)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (
            zxbcdt, conv_weight, dt_bias, A, D, seq_idx, conv, x, B, C, dt, scores, decay, decay_b, decay_c,
            kept, X, mixed, b_decayed, c_decayed, states, y,
        ) = ctx.saved_tensors  # fmt: skip
        heads, head_dim = x.shape[2], x.shape[4]
        groups, state_dim = B.shape[2], B.shape[4]
        inner, channels = heads * head_dim, conv.shape[-1]
        z, xbc, dt_in = zxbcdt.split([inner, channels, heads], -1)
        grad_zxbcdt = torch.empty_like(zxbcdt)
        grad_z, grad_xbc, grad_dt_in = grad_zxbcdt.split([inner, channels, heads], -1)

        def of_groups(t: Tensor, by: Tensor) -> Tensor:
            """The sum over the heads of each group, of flat `t` times `by`; flat."""
            return (t.view(*by.shape[:4], -1) * by).unflatten(2, (groups, -1)).sum(3).flatten(0, 2)

        # The gate, and D.
        (grad,) = grads
        _silu_backward(grad * y, z, grad_input=grad_z)
        grad_y = by_chunk(grad * F.silu(z), head_dim).contiguous()
        grad_D = (grad_y * x).sum((0, 1, 3, 4))
        dy = grad_y.flatten(0, 2)

        # The states, from the last chunk to the first: `grad_after` is of the state after each chunk.
        at_start = torch.bmm(c_decayed.mT, dy).view_as(states)
        grad_after = torch.zeros_like(states)
        after = grad_after.unbind(1)
        for c, (new, factor) in reversed(
            list(enumerate(zip(at_start.unbind(1), kept.unbind(1), strict=True)))
        ):
            if c:
                torch.addcmul(new, after[c], factor, out=after[c - 1])
        flat_after, flat_states = (t.view(-1, state_dim, head_dim) for t in (grad_after, states))

        # The four products, and the decays: E has what each pair of tokens adds to the gradient of its decay.
        grad_X = torch.bmm(mixed.mT, dy).baddbmm_(b_decayed, flat_after)
        grad_mixed = torch.bmm(dy, X.mT).view_as(decay)
        grad_b, grad_c = torch.bmm(X, flat_after.mT), torch.bmm(dy, flat_states.mT)
        grad_decay = grad_mixed.mul_(decay).unflatten(2, (groups, -1))
        grad_scores = grad_decay.sum(3).flatten(0, 2)
        pairs = grad_decay.mul_(scores.unsqueeze(3)).flatten(2, 3)
        to_end = (grad_b * b_decayed).sum(-1).view_as(dt[..., 0])
        from_start = (grad_c * c_decayed).sum(-1).view_as(to_end)
        grad_log = pairs.sum(-1).sub_(pairs.sum(-2)).add_(from_start).sub_(to_end)
        grad_kept = (grad_after * states).sum(-1, keepdim=True) * kept
        grad_log[..., -1:] += to_end.sum(-1, keepdim=True) + grad_kept
        grad_log = grad_log.flip(-1).cumsum(-1).flip(-1)  # of dt * A
        grad_dt = (grad_X.view_as(x) * x).sum(-1).addcmul_(grad_log, A.view(-1, 1))
        grad_A = (grad_log * dt.squeeze(-1)).sum((0, 1, 3))

        # Back through the activation, the convolution and softplus.
        grad_conv = torch.empty_like(conv)
        grad_x, grad_B, grad_C = grad_conv.split([inner, groups * state_dim, groups * state_dim], -1)
        torch.addcmul(grad_X.view_as(x) * dt, grad_y, D.view(-1, 1, 1), out=by_chunk(grad_x, head_dim))
        flat_B, flat_C = B.flatten(0, 2), C.flatten(0, 2)
        by_chunk(grad_B, state_dim).copy_(
            of_groups(grad_b, decay_b).baddbmm_(grad_scores.mT, flat_C).view_as(B)
        )
        by_chunk(grad_C, state_dim).copy_(of_groups(grad_c, decay_c).baddbmm_(grad_scores, flat_B).view_as(C))
        _silu_backward(grad_conv, conv, grad_input=grad_conv)
        grad_weight, grad_bias = mamba2.convolve_backward(grad_conv, xbc, conv_weight, seq_idx, out=grad_xbc)
        torch.mul(grad_dt.transpose(2, 3).flatten(1, 2), (dt_in + dt_bias).sigmoid_(), out=grad_dt_in)
        return grad_zxbcdt, grad_weight, grad_bias, grad_dt_in.sum((0, 1)), grad_A, grad_D, None, None
