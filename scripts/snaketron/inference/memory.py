"""What layers remember of the tokens that the rows of a decoder have read: keys and values, or a state."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from snaketron.inference.direct import Piece
from snaketron.model.megatron.mamba2 import convolve, ssd_scan, ssd_step

import torch
import torch.nn.functional as F
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass
class Reading:
    """The rows that read tokens now, and what a layer needs to know of them.

    rows: neighbours in memory, or the numbers (rows,) of rows that begin together.
    before: (rows,), the tokens that each has read before.
    span: tokens that attention looks at, those that are read included.
    begins: whether no row has read a token before.
    counts: (rows,), the tokens of each row, after which there is padding; None where there is none.
    last: whether the logits after the last token of each row are all that is asked for.
    """

    rows: slice | Tensor
    before: Tensor
    span: int = 0
    begins: bool = False
    counts: Tensor | None = None
    last: bool = False

    def numbers(self) -> Tensor:
        """The numbers of the rows, (rows,)."""
        if isinstance(self.rows, Tensor):
            return self.rows
        return torch.arange(self.rows.start, self.rows.stop, device=self.before.device)

    def is_token(self, new: int) -> Tensor | None:
        """Where the `new` tokens of the rows are no padding, (rows, new); None where none is."""
        if self.counts is None:
            return None
        return torch.arange(new, device=self.before.device) < self.counts[:, None]

    def of_last(self, x: Tensor) -> Tensor:
        """What x (new, rows, width) has for the last token of each row, (1, rows, width)."""
        if self.counts is None:
            return x[-1:]
        return x[self.counts - 1, torch.arange(x.shape[1], device=x.device)][None]


class Attention:
    """Keys and values of a layer; `forward` stands for that of its core attention."""

    def __init__(self, layer: SelfAttention, batch_size: int, max_length: int, device: torch.device) -> None:
        heads, width = layer.num_query_groups_per_partition, layer.hidden_size_per_attention_head
        shape = batch_size, heads, max_length, width
        self.keys = torch.zeros(shape, dtype=layer.config.params_dtype, device=device)
        self.values = torch.zeros_like(self.keys)

    def forget(self, rows: Tensor) -> None:
        """Nothing to do: what lies after a row's length is not read."""

    def forward(self, reading: Reading, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query (new, rows, heads, width), key and value with fewer heads, to (new, rows, heads * width)."""
        device, new, span = query.device, len(query), reading.span
        seen = None
        if new == query.shape[1] == 1 and device.type == "cpu":  # a token of a single row sees all before it
            keys, values = self.keys[reading.rows], self.values[reading.rows]
            keys[0, :, span - 1], values[0, :, span - 1] = key[0, 0], value[0, 0]
        else:
            row = reading.numbers()[:, None]
            position = reading.before[:, None] + torch.arange(new, device=device)  # (rows, new)
            self.keys[row, :, position] = key.transpose(0, 1)
            self.values[row, :, position] = value.transpose(0, 1)
            if reading.begins and new > 1 and device.type == "cuda":
                return _of_whole_texts(query, key, value)
            # (rows, 1, new, span)
            seen = (torch.arange(span, device=device) <= position[..., None])[:, None]
        keys, values = self.keys[reading.rows, :, :span], self.values[reading.rows, :, :span]
        if new == 1:  # the heads that share keys are the rows of one product
            grouped = query[0].unflatten(1, (keys.shape[1], -1))
            return _attend(grouped, keys, values, seen).flatten(1)[None]
        return _attend(query.permute(1, 2, 0, 3), keys, values, seen).permute(2, 0, 1, 3).flatten(2)


def _of_whole_texts(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of rows that begin, on a GPU: each token sees those before it, and padding comes last."""
    query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    key, value = _for_each_head(query, key, value)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return out.permute(2, 0, 1, 3).flatten(2)


def _attend(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None) -> Tensor:
    """Attention (rows, heads, new, width) over keys and values of as many heads, or of fewer."""
    if query.is_cuda:  # where no kernel but the one that holds all scores takes fewer heads and a mask
        keys, values = _for_each_head(query, keys, values)
    # cuDNN's attention is left out: recorded with few tokens, it has read memory of an earlier call.
    kernels = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kernels) if query.is_cuda else contextlib.nullcontext():
        return F.scaled_dot_product_attention(
            query, keys, values, seen, enable_gqa=query.shape[1] != keys.shape[1]
        )


def _for_each_head(query: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Keys or values (rows, groups, tokens, width), again for each query head that shares them."""
    each = query.shape[1] // tensors[0].shape[1]
    return [t if each == 1 else t.repeat_interleave(each, 1) for t in tensors]


class Mamba:
    """Last inputs of a layer's convolution and the state of its scan; `forward` stands for the mixer's."""

    def __init__(
        self, mixer: MambaMixer, batch_size: int, device: torch.device, product: Callable[[Any], Piece]
    ) -> None:
        self.mixer = mixer
        self.in_proj, self.out_proj = product(mixer.in_proj), product(mixer.out_proj)
        channels, _, width = mixer.conv1d_weight.shape
        self.inputs = torch.zeros(batch_size, width - 1, channels, device=device)
        shape = batch_size, mixer.nheads_local_tp, mixer.d_state, mixer.headdim
        self.state = torch.zeros(shape, device=device)
        self.fused = device.type == "cuda"
        if self.fused:  # in the order in which the kernel of a step reads it
            self.state = self.state.mT.contiguous().mT
        self.weight = mixer.conv1d_weight.detach().float().squeeze(1)
        self.bias, self.dt_bias, self.D = (
            parameter.detach().float() for parameter in (mixer.conv1d_bias, mixer.dt_bias, mixer.D)
        )
        self.A = -mixer.A_log.detach().float().exp()
        inner, bc = mixer.d_inner_local_tp, mixer.ngroups_local_tp * mixer.d_state
        self._projected = [inner, inner + 2 * bc, mixer.nheads_local_tp]  # z; x, B and C; dt
        self._convolved = [inner, bc, bc]

    def forget(self, rows: Tensor) -> None:
        self.inputs[rows] = 0
        self.state[rows] = 0

    def forward(self, reading: Reading, hidden: Tensor) -> tuple[Tensor, None]:
        """hidden (new, rows, hidden size) to the same shape, and the bias that the mixer has (none)."""
        projected = self.in_proj(hidden)
        if self.fused and len(hidden) == 1 and isinstance(reading.rows, slice):
            y = self._step(reading.rows, projected[0])[None]
        else:
            y = self._read(reading, projected.transpose(0, 1).float()).transpose(0, 1)
        return self.out_proj(self.mixer.norm(y.to(projected.dtype).contiguous())), None

    def _read(self, reading: Reading, projected: Tensor) -> Tensor:
        """(rows, new, what in_proj gives) to (rows, new, inner size), in float32."""
        z, xbc, dt = projected.split(self._projected, -1)
        x, B, C = F.silu(self._convolve(reading, xbc)).split(self._convolved, -1)
        x = x.unflatten(-1, (-1, self.mixer.headdim))
        B, C = (t.unflatten(-1, (-1, self.mixer.d_state)) for t in (B, C))
        dt = F.softplus(dt + self.dt_bias)
        if (token := reading.is_token(dt.shape[1])) is not None:
            dt = dt * token[..., None]  # a step of size 0 leaves the state as it is
        y = self._scan(reading.rows, x, dt, B, C) + x * self.D.unsqueeze(-1)
        return y.flatten(2) * F.silu(z)

    def _convolve(self, reading: Reading, xbc: Tensor) -> Tensor:
        known = self.inputs.shape[1]
        inputs = torch.cat([self.inputs[reading.rows], xbc], 1)
        if reading.counts is None:
            self.inputs[reading.rows] = inputs[:, -known:]
        else:
            last = reading.counts[:, None] + torch.arange(known, device=xbc.device)
            self.inputs[reading.rows] = inputs[torch.arange(len(inputs), device=xbc.device)[:, None], last]
        if xbc.shape[1] == 1:
            return ((inputs.mT * self.weight).sum(-1) + self.bias).unsqueeze(1)
        return convolve(inputs, self.weight, self.bias, None)[:, known:]

    def _scan(self, rows: slice | Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        state = self.state[rows]
        if x.shape[1] == 1:
            y, self.state[rows] = ssd_step(x[:, 0], dt[:, 0], self.A, B[:, 0], C[:, 0], state)
            return y.unsqueeze(1)
        y, self.state[rows] = ssd_scan(x, dt, self.A, B, C, state)
        return y

    def _step(self, rows: slice, projected: Tensor) -> Tensor:
        """What `_read` gives for a token, (rows, what in_proj gives) to (rows, inner size), by two kernels.

        They read and write the state, 134 MB a layer for 64 rows of Nano, once. The plain step takes some 20
        kernels, and five of these pass over the state or over as much.
        """
        from causal_conv1d import causal_conv1d_update
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update

        z, xbc, dt = projected.split(self._projected, -1)
        convolved = causal_conv1d_update(
            xbc.float(), self.inputs[rows].mT, self.weight, self.bias, activation="silu"
        )
        x, B, C = convolved.split(self._convolved, -1)
        x, z = (t.unflatten(-1, (-1, self.mixer.headdim)) for t in (x, z))
        B, C = (t.unflatten(-1, (-1, self.mixer.d_state)) for t in (B, C))
        state = self.state[rows].mT  # (rows, heads, head width, state size)
        y = selective_state_update(
            state,
            x,
            dt[..., None].expand(x.shape),
            self.A[:, None, None].expand(state.shape[1:]),
            B,
            C,
            D=self.D[:, None].expand(state.shape[1:3]),
            z=z,
            dt_bias=self.dt_bias[:, None].expand(state.shape[1:3]),
            dt_softplus=True,
        )
        return y.flatten(1)
