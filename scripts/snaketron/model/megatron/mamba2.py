"""Mamba-2 in plain PyTorch: what mamba-ssm's Triton kernels compute on a GPU.

A layer runs a short causal convolution over x, B and C, then for every head the recurrence

    state[t] = exp(dt[t] * A) * state[t - 1] + dt[t] * x[t] B[t]^T        y[t] = state[t] C[t] + D x[t]

and gates y with silu(z). Convolution and state start afresh at the first token of each sequence, so
packed sequences never see each other. `seq_idx`, (batch, length), numbers the sequences of a row in
order; None means one sequence a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens that `scan_chunks` computes as one matrix product; 16 to 32 are fastest on a CPU.
CHUNK_SIZE = 32


def convolve(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None) -> Tensor:
    """Depthwise causal convolution that reads zeros before the start of a sequence.

    It is one pass over the data for each column of the weight, without padded copies.

    Args:
        x: (batch, length, channels).
        weight: (channels, width); the last column weighs the current token.
        bias: (channels,).
        seq_idx: (batch, length).
    """
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


def by_chunk(t: Tensor, width: int) -> Tensor:
    """(batch, length, k * width) as (batch, chunks, k, tokens of a chunk, width), a view."""
    return t.unflatten(-1, (-1, width)).unflatten(1, (-1, CHUNK_SIZE)).transpose(2, 3)


class Chunks(NamedTuple):
    """What `scan_chunks` computes on its way; the flat ones have their first three axes joined."""

    scores: Tensor  # b c g l l, of token l with token s
    decay: Tensor  # b c h l l, from token s to token l
    decay_b: Tensor  # b c h l 1, from a token to the end of its chunk
    decay_c: Tensor  # b c h l 1, from the start of its chunk to a token
    kept: Tensor  # b c h 1, over a chunk
    X: Tensor  # flat, x times dt
    mixed: Tensor  # flat, scores times decay
    b_decayed: Tensor  # flat, B times decay_b
    c_decayed: Tensor  # flat, C times decay_c
    states: Tensor  # b c h (n * head_dim), at the start of each chunk


def scan_chunks(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, seq_idx: Tensor | None, start: Tensor | None
) -> tuple[Tensor, Tensor, Chunks]:
    """The recurrence above, without D, as matrix products over chunks of tokens. It has no gradients.

    State-space duality: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 6 and listing 1.
    Shapes are written with b batch, c chunks, h heads, g groups, l tokens of a chunk, n state_dim. Batched
    products want three dimensions.

    Args:
        x: (b, c, h, l, head_dim).
        dt: (b, c, h, l, 1), positive step sizes.
        A: (h,), negative decay rates.
        B, C: (b, c, g, l, n); h / g consecutive heads share a group.
        seq_idx: (b, c * l).
        start: (b, h, n, head_dim), the state before the first token; None: zero.

    Returns:
        y, shaped as x; what each chunk adds to the state (b, c, h, n * head_dim); and the rest.
    """
    batch, chunks, heads, chunk, head_dim = x.shape
    groups, state_dim = B.shape[2], B.shape[4]
    # Powers of two: torch's exponential takes ten times as long where it gives almost nothing.
    log_decay = (dt * (A * math.log2(math.e)).view(-1, 1, 1)).squeeze(-1).cumsum(-1)  # b c h l
    within, to_end, from_start, keep = same_sequence(seq_idx, batch, chunks, dt)
    total = log_decay[..., -1:]
    decay = (log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)).add_(within).exp2_()
    decay_b = (total - log_decay + to_end).exp2_().unsqueeze(-1)
    decay_c = (log_decay + from_start).exp2_().unsqueeze(-1)
    kept = (total + keep).exp2_()

    def each_head(t: Tensor, by: Tensor) -> Tensor:
        """A tensor of groups times one of heads, flat."""
        return (t.unsqueeze(3) * by.unflatten(2, (groups, -1))).flatten(0, 3)

    X = (x * dt).flatten(0, 2)
    scores = B.new_empty(batch, chunks, groups, chunk, chunk)
    torch.bmm(C.flatten(0, 2), B.flatten(0, 2).mT, out=scores.flatten(0, 2))
    mixed, b_decayed, c_decayed = each_head(scores, decay), each_head(B, decay_b), each_head(C, decay_c)
    added = torch.bmm(b_decayed.mT, X).view(batch, chunks, heads, -1)
    states = torch.empty_like(added)
    states[:, 0] = 0 if start is None else start.flatten(2)
    before = states.unbind(1)
    for c, (new, factor) in enumerate(zip(added.unbind(1)[:-1], kept.unbind(1)[:-1], strict=True)):
        torch.addcmul(new, before[c], factor, out=before[c + 1])
    y = torch.bmm(mixed, X).baddbmm_(c_decayed, states.view(-1, state_dim, head_dim)).view_as(x)
    return y, added, Chunks(scores, decay, decay_b, decay_c, kept, X, mixed, b_decayed, c_decayed, states)


def ssd_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence above, without D, over a sequence of any length; it has no gradients.

    Args:
        x: (batch, length, heads, head_dim).
        dt: (batch, length, heads), positive step sizes.
        A: (heads,), negative decay rates.
        B, C: (batch, length, groups, state_dim).
        initial_state: (batch, heads, state_dim, head_dim), before the first token; None: zero.

    Returns:
        y, shaped as x, and the state after the last token, shaped as `initial_state`.
    """
    length, pad = x.shape[1], (0, 0, 0, -x.shape[1] % CHUNK_SIZE)  # after the end, with steps of size 0
    by_head, B, C = (by_chunk(F.pad(t.flatten(2), pad), t.shape[-1]).contiguous() for t in (x, B, C))
    steps = by_chunk(F.pad(dt, pad), 1).contiguous()
    y, added, parts = scan_chunks(by_head, steps, A, B, C, None, initial_state)
    end = torch.addcmul(added[:, -1], parts.states[:, -1], parts.kept[:, -1])
    return y.transpose(2, 3).flatten(1, 2)[:, :length], end.unflatten(2, (B.shape[4], x.shape[3]))


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


def same_sequence(seq_idx: Tensor | None, batch: int, chunks: int, like: Tensor) -> tuple[Tensor, ...]:
    """Zero where tokens are of one sequence, minus infinity elsewhere, to be added to log decays.

    Returns:
        Between tokens l and s <= l of a chunk (b, c, 1, l, s); between a token and the last one of its
        chunk, and the last one of the chunk before (b, c, 1, l); between these two (b, c, 1, 1).
    """
    causal = like.new_full((CHUNK_SIZE, CHUNK_SIZE), -torch.inf).triu(1)
    zero = like.new_zeros(())
    if seq_idx is None:
        return causal, zero, zero, zero
    seq = seq_idx.view(batch, chunks, 1, CHUNK_SIZE)
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
