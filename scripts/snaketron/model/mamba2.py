"""Mamba-2 in plain PyTorch: what mamba-ssm's Triton kernels compute on a GPU.

A layer runs a short causal convolution over x, B and C, then for every head the recurrence

    state[t] = exp(dt[t] * A) * state[t - 1] + dt[t] * x[t] B[t]^T        y[t] = state[t] C[t] + D x[t]

and gates y with silu(z). Convolution and state start afresh at the first token of each sequence, so
packed sequences never see each other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Tokens that `ssd_scan` computes as one matrix product.
CHUNK_SIZE = 32


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None) -> Tensor:
    """Depthwise causal convolution that reads zeros before the start of a sequence.

    Args:
        x: (batch, length, channels).
        weight: (channels, width); the last column weighs the current token.
        bias: (channels,).
        seq_idx: (batch, length), the number of the sequence a token belongs to; None: one sequence a row.
    """
    width = weight.shape[1]
    y = x * weight[:, -1] + bias
    for back in range(1, min(width, x.shape[1])):
        term = x[:, :-back] * weight[:, -1 - back]
        if seq_idx is not None:
            term = term * (seq_idx[:, back:] == seq_idx[:, :-back]).unsqueeze(-1)
        y = y + F.pad(term, (0, 0, back, 0))
    return y


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    seq_idx: Tensor | None,
    chunk_size: int = CHUNK_SIZE,
) -> Tensor:
    """The recurrence above, without D, in chunks of matrix products.

    State-space duality: Dao and Gu, "Transformers are SSMs" (arXiv 2405.21060), section 6 and listing 1.

    Args:
        x: (batch, length, heads, head_dim).
        dt: (batch, length, heads), positive step sizes.
        A: (heads,), negative decay rates.
        B, C: (batch, length, groups, state_dim); heads / groups consecutive heads share a group.
        seq_idx: (batch, length) as in `causal_conv1d`.

    Returns:
        y, shaped as x.
    """
    batch, length, heads, head_dim = x.shape
    groups, state_dim = B.shape[2:]
    log_decay = dt * A
    if seq_idx is not None:
        starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
        log_decay = log_decay.masked_fill(starts.unsqueeze(-1), -torch.inf)
    pad = -length % chunk_size
    shape = (batch, -1, chunk_size)
    x = F.pad(x * dt.unsqueeze(-1), (0, 0, 0, 0, 0, pad)).view(*shape, heads, head_dim)
    B, C = (
        F.pad(t, (0, 0, 0, 0, 0, pad)).view(*shape, groups, state_dim).repeat_interleave(heads // groups, 3)
        for t in (B, C)
    )
    log_decay = F.pad(log_decay, (0, 0, 0, pad)).view(*shape, heads).permute(0, 3, 1, 2)  # b h c l
    # decay[i, j] = exp(sum of log_decay over j+1..i) for j <= i, else 0
    lower = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).tril()
    sums = (
        log_decay.unsqueeze(-1)
        .expand(*log_decay.shape, chunk_size)
        .masked_fill(~lower.tril(-1), 0)
        .cumsum(-2)
    )
    decay = sums.masked_fill(~lower, -torch.inf).exp()
    y = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, decay, x)
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, decay[..., -1, :], x)
    state, carried = x.new_zeros(batch, heads, head_dim, state_dim), []
    for chunk, keep in enumerate(log_decay.sum(-1).exp().unbind(2)):
        carried.append(state)
        state = state * keep[..., None, None] + states[:, chunk]
    y = y + torch.einsum("bclhn,bchpn,bhcl->bclhp", C, torch.stack(carried, 1), log_decay.cumsum(-1).exp())
    return y.reshape(batch, -1, heads, head_dim)[:, :length]


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
        chunk_size: of the GPU kernel; here it is `CHUNK_SIZE`, which changes nothing but speed.
        seq_idx: (batch, length) as in `causal_conv1d`.
        headdim: width of a head, inner / heads.

    Returns:
        (batch, length, inner), of zxbcdt's type; computed in float32 (float64 for float64).
    """
    if headdim is None or activation != "silu":
        raise ValueError(f"only headdim given and silu are supported, not {headdim} and {activation}")
    heads = A.shape[0]
    inner = heads * headdim
    batch, length, width = zxbcdt.shape
    bc = (width - 2 * inner - heads) // 2
    work = torch.promote_types(zxbcdt.dtype, torch.float32)
    z, xbc, dt = zxbcdt.to(work).split([inner, inner + 2 * bc, heads], -1)
    xbc = F.silu(causal_conv1d(xbc, conv1d_weight.to(work), conv1d_bias.to(work), seq_idx))
    x, B, C = xbc.split([inner, bc, bc], -1)
    x = x.view(batch, length, heads, headdim)
    B, C = (t.view(batch, length, ngroups, bc // ngroups) for t in (B, C))
    y = ssd_scan(x, F.softplus(dt + dt_bias), A, B, C, seq_idx) + x * D.to(work).view(heads, -1)
    return (y.reshape(batch, length, inner) * F.silu(z)).to(zxbcdt.dtype)


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
        work = torch.promote_types(x.dtype, torch.float32)
        y = x.to(work) if z is None else x.to(work) * F.silu(z.to(work))
        y = F.rms_norm(y.unflatten(-1, (-1, self.group_size)), (self.group_size,), eps=self.eps)
        return (y.flatten(-2) * self.weight).to(x.dtype)
