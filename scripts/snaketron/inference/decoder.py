"""A model that remembers the tokens that it has read, so that each further token costs one token.

Two pieces of the model are exchanged while it decodes: attention reads the keys and values of earlier tokens
too, and Mamba-2 goes on from its last states. All other pieces are those of a training; so adapters, tensor,
expert and pipeline parallelism and the kernels of a GPU are as they are there. One process on a CPU calls
them without megatron-core's wrappers (`direct`), and one with a GPU records their kernels (`recorded`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from snaketron.inference.direct import Direct, Piece, applies, linear, wrapped
from snaketron.inference.recorded import Recorded, recordable
from snaketron.model import backend
from snaketron.model.build import BuiltModel
from snaketron.model.megatron import internals
from snaketron.model.megatron.mamba2 import causal_conv1d, ssd_scan, ssd_step

import torch
import torch.nn.functional as F
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


@dataclass
class _Reading:
    """The rows that read tokens now, and the number of tokens that each has read before."""

    rows: slice
    before: Tensor  # (rows,)
    span: int  # tokens that attention looks at, those that are read included


class Decoder:
    """Some rows of tokens that grow, each at its own pace; made by `decoding`.

    Every rank of the model must make the same calls. Ranks that share a context (context parallelism) or have
    other data (data parallelism) all do the same work.
    """

    def __init__(self, built: BuiltModel, batch_size: int, max_length: int) -> None:
        self.built, self.max_length = built, max_length
        self.device = backend.device()
        self.lengths = [0] * batch_size  # tokens that each row has read
        self._lengths = torch.zeros(
            batch_size, dtype=torch.int64, device=self.device
        )  # the same, for kernels
        self._reading = _Reading(slice(0), self._lengths[:0], 0)
        decoder = built.model.decoder
        self._layers = {
            module.core_attention: _Attention(module, batch_size, max_length, self.device)
            for module in decoder.modules()
            if isinstance(module, SelfAttention)
        } | {
            module: _Mamba(module, batch_size, self.device, linear if applies(built) else wrapped)
            for module in decoder.modules()
            if isinstance(module, MambaMixer)
        }
        remembering = {
            module: functools.partial(layer.forward, self._reading) for module, layer in self._layers.items()
        }
        self._direct = Direct(built, remembering) if applies(built) else None
        self._recorded = Recorded(self._compute) if recordable(built) else None

    def forget(self, row: int) -> None:
        """Begin the row anew, without a token."""
        self.lengths[row] = self._lengths[row] = 0
        for layer in self._layers.values():
            layer.forget(row)

    def read(self, row: int, ids: Sequence[int]) -> Tensor | None:
        """Append tokens to a row.

        Returns:
            The logits of the token after them, (1, vocabulary) in float32, on the ranks of the last pipeline
            stage; None on the others.
        """
        return _last(self._forward(slice(row, row + 1), torch.tensor([ids], device=self.device)))

    def step(self, ids: Tensor) -> Tensor | None:
        """Append a token to each row: `ids` (batch,). Returns what `read` does, (batch, vocabulary)."""
        return _last(self._forward(slice(0, len(self.lengths)), ids.to(self.device)[:, None]))

    def read_all(self, ids: Tensor) -> Tensor | None:
        """Append tokens (batch, new) to all rows.

        Returns:
            The logits of the token after each, (batch, new, vocabulary) in float32, where `read` has some.
        """
        return self._forward(slice(0, len(self.lengths)), ids.to(self.device))

    def _forward(self, rows: slice, ids: Tensor) -> Tensor | None:
        longest = max(self.lengths[rows]) + ids.shape[1]
        if longest > self.max_length:
            raise ValueError(
                f"row of {longest - ids.shape[1]} + {ids.shape[1]} tokens, space for {self.max_length}"
            )
        self._reading.rows, self._reading.before = rows, self._lengths[rows]
        if self._recorded and ids.shape == (len(self.lengths), 1):
            self._reading.span = self.max_length  # a recording looks at as many whenever it is started
            logits = self._recorded(ids)
        else:
            self._reading.span = longest
            logits = self._compute(ids)
        self.lengths[rows] = [length + ids.shape[1] for length in self.lengths[rows]]
        return logits

    def _compute(self, ids: Tensor) -> Tensor | None:
        """Logits of the tokens that the rows of `_reading` read, which are longer afterwards."""
        logits = self._direct(ids) if self._direct else self._by_megatron(ids)
        self._reading.before += ids.shape[1]
        return None if logits is None else logits[..., : self.built.vocab_size].float()

    def _by_megatron(self, ids: Tensor) -> Tensor | None:
        """Logits on the ranks of the last pipeline stage."""

        def forward(_batches: Any, model: Any) -> tuple[Tensor, Any]:
            positions = torch.zeros_like(ids)  # there are no embeddings of positions
            logits = model(ids, positions, None, runtime_gather_output=True)
            return logits, lambda output, non_loss_data=False: output

        outputs = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=None,
            model=[self.built.module],
            num_microbatches=1,
            seq_length=ids.shape[1],
            micro_batch_size=ids.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
        return outputs[0] if outputs else None

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Let the model's layers read and write this memory."""
        for module, layer in self._layers.items():
            module.forward = _without_options(layer.forward, self._reading)  # hides the method of the class
        try:
            yield
        finally:
            for module in self._layers:
                del module.forward


@contextlib.contextmanager
def decoding(built: BuiltModel, batch_size: int, max_length: int) -> Iterator[Decoder]:
    """A decoder of `batch_size` rows of at most `max_length` tokens; the model is as before afterwards.

    Memory of a row, divided by the tensor parallel size: 2 * query groups * head width numbers for each token
    and attention layer, and heads * head width * state size float32 numbers for each Mamba layer.
    """
    decoder = Decoder(built, batch_size, max_length)
    with (
        built.evaluating(),
        internals.without_mtp(built.model),
        internals.without_sequence_parallel(built.model),
        decoder.attached(),
    ):
        yield decoder


def _last(logits: Tensor | None) -> Tensor | None:
    return None if logits is None else logits[:, -1]


def _without_options(forward: Callable[..., Any], reading: _Reading) -> Callable[..., Any]:
    """The layer's forward as megatron-core calls it: masks and packed sequences play no part in decoding."""

    def call(*tensors: Tensor | None, **_: Any) -> Any:
        return forward(reading, *(tensor for tensor in tensors if tensor is not None))

    return call


class _Attention:
    """Keys and values of a layer; `forward` stands for that of its core attention."""

    def __init__(self, layer: SelfAttention, batch_size: int, max_length: int, device: torch.device) -> None:
        heads, width = layer.num_query_groups_per_partition, layer.hidden_size_per_attention_head
        shape = batch_size, heads, max_length, width
        self.keys = torch.zeros(shape, dtype=layer.config.params_dtype, device=device)
        self.values = torch.zeros_like(self.keys)

    def forget(self, row: int) -> None:
        """Nothing to do: what lies after a row's length is not read."""

    def forward(self, reading: _Reading, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query (new, rows, heads, width), key and value with fewer heads, to (new, rows, heads * width)."""
        device, new, span = query.device, len(query), reading.span
        keys, values = self.keys[reading.rows], self.values[reading.rows]
        seen = None
        if new == len(keys) == 1 and device.type == "cpu":  # a token of a single row sees all before it
            keys[0, :, span - 1], values[0, :, span - 1] = key[0, 0], value[0, 0]
        else:
            row = torch.arange(len(keys), device=device)[:, None]
            position = reading.before[:, None] + torch.arange(new, device=device)  # (rows, new)
            keys[row, :, position], values[row, :, position] = key.transpose(0, 1), value.transpose(0, 1)
            # (rows, 1, new, span)
            seen = (torch.arange(span, device=device) <= position[..., None])[:, None]
        keys, values = keys[:, :, :span], values[:, :, :span]
        if new == 1:  # the heads that share keys are the rows of one product
            grouped = query[0].unflatten(1, (keys.shape[1], -1))
            return _attend(grouped, keys, values, seen).flatten(1)[None]
        out = _attend(query.permute(1, 2, 0, 3), keys, values, seen, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, *, enable_gqa: bool = False
) -> Tensor:
    # cuDNN's attention is left out: recorded with few tokens, it has read memory of an earlier call.
    kernels = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(kernels) if query.is_cuda else contextlib.nullcontext():
        return F.scaled_dot_product_attention(query, keys, values, seen, enable_gqa=enable_gqa)


class _Mamba:
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
        self.weight = mixer.conv1d_weight.detach().float().squeeze(1)
        self.bias, self.dt_bias, self.D = (
            parameter.detach().float() for parameter in (mixer.conv1d_bias, mixer.dt_bias, mixer.D)
        )
        self.A = -mixer.A_log.detach().float().exp()

    def forget(self, row: int) -> None:
        self.inputs[row] = 0
        self.state[row] = 0

    def forward(self, reading: _Reading, hidden: Tensor) -> tuple[Tensor, None]:
        """hidden (new, rows, hidden size) to the same shape, and the bias that the mixer has (none)."""
        mixer, rows = self.mixer, reading.rows
        projected = self.in_proj(hidden)
        inner, bc = mixer.d_inner_local_tp, mixer.ngroups_local_tp * mixer.d_state
        z, xbc, dt = (
            projected.transpose(0, 1).float().split([inner, inner + 2 * bc, mixer.nheads_local_tp], -1)
        )
        x, B, C = F.silu(self._convolve(rows, xbc)).split([inner, bc, bc], -1)
        x = x.unflatten(-1, (-1, mixer.headdim))
        B, C = (t.unflatten(-1, (-1, mixer.d_state)) for t in (B, C))
        y = self._scan(rows, x, F.softplus(dt + self.dt_bias), B, C) + x * self.D.unsqueeze(-1)
        y = (y.flatten(2) * F.silu(z)).to(projected.dtype).transpose(0, 1).contiguous()
        return self.out_proj(mixer.norm(y)), None

    def _convolve(self, rows: slice, xbc: Tensor) -> Tensor:
        known = self.inputs.shape[1]
        inputs = torch.cat([self.inputs[rows], xbc], 1)
        self.inputs[rows] = inputs[:, -known:]
        if xbc.shape[1] == 1:
            return ((inputs.mT * self.weight).sum(-1) + self.bias).unsqueeze(1)
        return causal_conv1d(inputs, self.weight, self.bias, None)[:, known:]

    def _scan(self, rows: slice, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        state = self.state[rows]
        if x.shape[1] == 1:
            y, self.state[rows] = ssd_step(x[:, 0], dt[:, 0], self.A, B[:, 0], C[:, 0], state)
            return y.unsqueeze(1)
        y, self.state[rows] = ssd_scan(x, dt, self.A, B, C, None, initial_state=state)
        return y
