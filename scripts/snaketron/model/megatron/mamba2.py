"""Mamba-2 in plain PyTorch: what mamba-ssm's Triton kernels compute on a GPU.

A layer runs a short causal convolution over x, B and C, then for every head the recurrence

    state[t] = exp(dt[t] * A) * state[t - 1] + dt[t] * x[t] B[t]^T        y[t] = state[t] C[t] + D x[t]

and gates y with silu(z). Convolution and state start afresh at the first token of each sequence, so
packed sequences never see each other. `seq_idx`, (batch, length), numbers the sequences of a row in
order; None means one sequence a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens that `ssd_scan` computes as one matrix product; 16 to 32 are fastest on a CPU.
CHUNK_SIZE = 32


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, seq_idx)
        return convolve(x, weight, bias, seq_idx)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, seq_idx = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        return grad_x, *convolve_backward(grads[0], x, weight, seq_idx, out=grad_x), None


def convolve(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None) -> Tensor:
    """`causal_conv1d` by one pass over the data for each column of the weight, without padded copies."""
    columns = weight.t().contiguous()
    y = torch.addcmul(bias, x, columns[-1])
    for back, column, same in _taps(columns, seq_idx):
        y[:, back:].addcmul_(_masked(x[:, :-back], same), column)
    return y


def convolve_backward(
    grad: Tensor, x: Tensor, weight: Tensor, seq_idx: Tensor | None, *, out: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias; that of x, shaped as x, is written to `out`."""
    columns = weight.t().contiguous()
    torch.mul(grad, columns[-1], out=out)
    grad_columns = [(grad * x).sum((0, 1))]
    for back, column, same in _taps(columns, seq_idx):
        later = _masked(grad[:, back:], same)
        out[:, :-back].addcmul_(later, column)
        grad_columns.append((later * x[:, :-back]).sum((0, 1)))
    return torch.stack(grad_columns[::-1], 1), grad.sum((0, 1))


def _taps(columns: Tensor, seq_idx: Tensor | None) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """How far back, its weights, and where that token is of the same sequence (None: everywhere).

    `columns` (width, channels) is the transposed weight.
    """
    for back in range(1, len(columns)):
        same = None if seq_idx is None else (seq_idx[:, back:] == seq_idx[:, :-back]).unsqueeze(-1)
        yield back, columns[-1 - back], same


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None) -> Tensor:
    """Depthwise causal convolution that reads zeros before the start of a sequence.

    Args:
        x: (batch, length, channels).
        weight: (channels, width); the last column weighs the current token.
        bias: (channels,).
        seq_idx: (batch, length).
    """
    return _CausalConv1d.apply(x, weight[:, -x.shape[1] :], bias, seq_idx)


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    seq_idx: Tensor | None,
    chunk_size: int = CHUNK_SIZE,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence above, without D, as matrix products over chunks of tokens.

    State-space duality: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 6 and listing 1.
    Below, shapes are written with b batch, c chunks, h heads, g groups, l tokens of a chunk, n state_dim.

    Args:
        x: (batch, length, heads, head_dim).
        dt: (batch, length, heads), positive step sizes.
        A: (heads,), negative decay rates.
        B, C: (batch, length, groups, state_dim); heads / groups consecutive heads share a group.
        seq_idx: (batch, length).
        initial_state: (batch, heads, state_dim, head_dim), before the first token; None: zero.

    Returns:
        y, shaped as x, and the state after the last token, shaped as `initial_state`.
    """
    batch, length, heads, head_dim = x.shape
    groups, state_dim = B.shape[2:]
    chunks = -(-length // chunk_size)
    pad = chunks * chunk_size - length

    def split(t: Tensor) -> Tensor:
        """(batch, length, k, width) to (b, c, k, l, width)."""
        return F.pad(t, (0, 0, 0, 0, 0, pad)).unflatten(1, (chunks, chunk_size)).transpose(2, 3)

    def each_head(t: Tensor) -> Tensor:
        """(b, c, h, ...) as (b, c, g, heads of the group, ...)."""
        return t.unflatten(2, (groups, -1))

    within, to_end, from_start, keep = same_sequence(seq_idx, batch, chunks, chunk_size, pad, x)
    x = split(x * dt.unsqueeze(-1)).reshape(-1, chunk_size, head_dim)
    B, C = (split(t).reshape(-1, chunk_size, state_dim) for t in (B, C))
    log_decay = split((dt * A).unsqueeze(-1)).squeeze(-1).cumsum(-1)  # b c h l, since the start of the chunk

    # What the tokens of a chunk give each other: bchl s, from token s to token l.
    decay = (log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2) + within).exp()
    scores = (C @ B.mT).unflatten(0, (batch, chunks, groups, 1)) * each_head(decay)
    y = scores.view(-1, chunk_size, chunk_size) @ x

    # What a chunk adds to the state, and the state at the start of each chunk.
    total = log_decay[..., -1:]
    b_decayed = B.unflatten(0, (batch, chunks, groups, 1)) * each_head(
        (total - log_decay + to_end).exp()
    ).unsqueeze(-1)
    added = (b_decayed.reshape(-1, chunk_size, state_dim).mT @ x).view(batch, chunks, heads, -1)
    state, states = torch.zeros_like(added[:, 0]) if initial_state is None else initial_state.flatten(2), []
    # Unbound: the gradient of `added[:, chunk]` has the size of all of `added`, for each chunk.
    for new, kept in zip(added.unbind(1), (total + keep).exp().unbind(1), strict=True):
        states.append(state)
        state = torch.addcmul(new, state, kept)
    state_at_start = torch.stack(states, 1).view(-1, state_dim, head_dim)

    # What the tokens read from the state at the start of their chunk.
    c_decayed = C.unflatten(0, (batch, chunks, groups, 1)) * each_head(
        (log_decay + from_start).exp()
    ).unsqueeze(-1)
    y = torch.baddbmm(y, c_decayed.reshape(-1, chunk_size, state_dim), state_at_start)
    y = y.view(batch, chunks, heads, chunk_size, head_dim).transpose(2, 3).flatten(1, 2)[:, :length]
    return y, state.unflatten(2, (state_dim, head_dim))


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of the recurrence above, without D: what `ssd_scan` gives for a length of one.

    Args:
        x: (batch, heads, head_dim).
        dt: (batch, heads), positive step sizes.
        A: (heads,), negative decay rates.
        B, C: (batch, groups, state_dim); heads / groups consecutive heads share a group.
        state: (batch, heads, state_dim, head_dim), before the token.

    Returns:
        y, shaped as x, and the state after the token.
    """
    each = x.shape[1] // B.shape[1]
    B, C = (t.repeat_interleave(each, 1) for t in (B, C))
    state = state * (dt * A).exp()[..., None, None] + B.unsqueeze(-1) * (x * dt.unsqueeze(-1)).unsqueeze(-2)
    return (C.unsqueeze(-2) @ state).squeeze(-2), state


def same_sequence(
    seq_idx: Tensor | None, batch: int, chunks: int, chunk_size: int, pad: int, like: Tensor
) -> tuple[Tensor, ...]:
    """Zero where tokens are of one sequence, minus infinity elsewhere, to be added to log decays.

    Returns:
        Between tokens l and s <= l of a chunk (b, c, 1, l, s); between a token and the last one of its
        chunk, and the last one of the chunk before (b, c, 1, l); between these two (b, c, 1, 1).
    """
    causal = like.new_full((chunk_size, chunk_size), -torch.inf).triu(1)
    zero = like.new_zeros(())
    if seq_idx is None:
        return causal, zero, zero, zero
    seq = torch.cat([seq_idx, seq_idx[:, -1:].expand(-1, pad)], 1).view(batch, chunks, 1, chunk_size)
    last = seq[..., -1:]
    before = F.pad(last[:, :-1], (0, 0, 0, 0, 1, 0))  # the state before the first chunk is zero in any case

    def where(same: Tensor) -> Tensor:
        return torch.where(same, zero, -torch.inf)

    within = torch.where(seq.unsqueeze(-1) == seq.unsqueeze(-2), causal, -torch.inf)
    return within, where(seq == last), where(seq == before), where(last == before)


class RMSNormGated(torch.nn.Module):
    """RMSNorm within groups of channels, of x * silu(z) (of x where there is no z).

    weight * x / sqrt(mean over the group of x^2 + eps)
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if norm_before_gate:
            raise ValueError("norm_before_gate is not supported: Nemotron gates first")
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.eps, self.group_size = eps, group_size or hidden_size

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """x and z (..., hidden_size) to the same shape and type; computed in float32 at least."""
        work = torch.promote_types(x.dtype, torch.float32)
        y = x.to(work) if z is None else x.to(work) * F.silu(z.to(work))
        y = F.rms_norm(y.unflatten(-1, (-1, self.group_size)), (self.group_size,), eps=self.eps)
        return (y.flatten(-2) * self.weight).to(x.dtype)
