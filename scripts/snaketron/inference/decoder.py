"""A model that remembers the tokens that it has read, so that each further token costs one token.

Two pieces of the model are exchanged while it decodes: attention reads the keys and values of earlier tokens
too, and Mamba-2 goes on from its last states. All other pieces are those of a training; so adapters, tensor,
expert and pipeline parallelism and the kernels of a GPU are as they are there. One process on a CPU calls
them without megatron-core's wrappers (`direct`), and one with a GPU records their kernels (`recorded`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from snaketron.inference.direct import Direct, applies, linear, wrapped
from snaketron.inference.memory import Attention, Mamba, Reading
from snaketron.inference.recorded import Recorded, recordable
from snaketron.model import backend
from snaketron.model.build import BuiltModel
from snaketron.model.megatron import internals

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.ssm.mamba_mixer import MambaMixer
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# Tokens that are read at once, padding included. They keep an H200 busy for about as long as the host takes
# to start the kernels; a Mamba layer of Nano needs 2 GB for them meanwhile, and one of Super 4 GB.
READ_AT_ONCE = 8192


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
        self._reading = Reading(slice(0), self._lengths[:0])
        decoder = built.model.decoder
        self._layers = {
            module.core_attention: Attention(module, batch_size, max_length, self.device)
            for module in decoder.modules()
            if isinstance(module, SelfAttention)
        } | {
            module: Mamba(module, batch_size, self.device, linear if applies(built) else wrapped)
            for module in decoder.modules()
            if isinstance(module, MambaMixer)
        }
        remembering = {
            module: functools.partial(layer.forward, self._reading) for module, layer in self._layers.items()
        }
        self._direct = Direct(built, remembering) if applies(built) else None
        self._recorded = Recorded(self._compute) if recordable(built) else None

    def forget(self, *rows: int) -> None:
        """Begin rows anew, without a token."""
        if not rows:
            return
        numbers = torch.tensor(rows, device=self.device)
        self._lengths[numbers] = 0
        for row in rows:
            self.lengths[row] = 0
        for layer in self._layers.values():
            layer.forget(numbers)

    def read(self, row: int, ids: Sequence[int]) -> Tensor | None:
        """Append tokens to a row.

        Returns:
            The logits of the token after them, (1, vocabulary) in float32, on the ranks of the last pipeline
            stage; None on the others.
        """
        logits = None
        for start in range(0, len(ids), READ_AT_ONCE):
            piece = torch.tensor([ids[start : start + READ_AT_ONCE]], device=self.device)
            logits = self._forward(range(row, row + 1), piece, last=True)
        return _only(logits)

    def begin(self, texts: Mapping[int, Sequence[int]]) -> Tensor | None:
        """Forget what these rows hold and read a text into each: all at once, the shorter ones padded.

        Returns what `read` does, (texts, vocabulary).
        """
        self.forget(*texts)
        if len(texts) == 1:
            [(row, ids)] = texts.items()
            return self.read(row, ids)
        padded = pad_sequence([torch.tensor(ids) for ids in texts.values()], batch_first=True)
        return _only(
            self._forward(
                list(texts), padded.to(self.device), counts=[len(ids) for ids in texts.values()], last=True
            )
        )

    def step(self, ids: Tensor) -> Tensor | None:
        """Append a token to each row: `ids` (batch,). Returns what `read` does, (batch, vocabulary)."""
        return _only(self._forward(range(len(self.lengths)), ids.to(self.device)[:, None]))

    def read_all(self, ids: Tensor) -> Tensor | None:
        """Append tokens (batch, new) to all rows.

        Returns:
            The logits of the token after each, (batch, new, vocabulary) in float32, where `read` has some.
        """
        return self._forward(range(len(self.lengths)), ids.to(self.device))

    def _forward(
        self,
        rows: range | list[int],
        ids: Tensor,
        *,
        counts: Sequence[int] | None = None,
        last: bool = False,
    ) -> Tensor | None:
        """Logits (rows, new, vocabulary), or of the `last` tokens alone (rows, 1, vocabulary).

        `ids` (rows, new) has `counts` tokens in each row, and then padding; without counts, only tokens.
        """
        self.built.alive()
        new = ids.shape[1]
        read = max(self.lengths[row] for row in rows)
        if read + new > self.max_length:
            raise ValueError(f"row of {read} + {new} tokens, space for {self.max_length}")
        reading = self._reading
        if isinstance(rows, range):
            reading.rows = slice(rows.start, rows.stop)
        else:
            reading.rows = torch.tensor(rows, device=self.device)
        reading.counts = None if counts is None else torch.tensor(counts, device=self.device)
        reading.before, reading.begins = self._lengths[reading.rows], read == 0
        reading.last = last and new > 1
        if self._recorded and new == 1 and rows == range(len(self.lengths)):
            reading.span = self.max_length  # a recording looks at as many whenever it is started
            logits = self._recorded(ids)
        else:
            reading.span = read + new
            logits = self._compute(ids)
        if reading.counts is not None:
            self._lengths[reading.rows] += reading.counts
        for row, count in zip(rows, counts or [new] * len(rows), strict=True):
            self.lengths[row] += count
        return logits

    def _compute(self, ids: Tensor) -> Tensor | None:
        """Logits of the tokens that the rows of `_reading` read.

        Neighbours are longer afterwards; the lengths of other rows are copies here.
        """
        logits = self._direct(ids) if self._direct else self._by_megatron(ids)
        if self._direct and logits is not None and self._reading.last:
            logits = self._reading.of_last(logits.transpose(0, 1)).transpose(0, 1)
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
            # Pipeline stages expect a part of the tokens from each rank of a context, and here each has all.
            seq_length=ids.shape[1] * self.built.run.parallel.context_parallel_size,
            micro_batch_size=ids.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
        return outputs[0] if outputs else None

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Let the model's layers read and write this memory."""
        forwards = {
            module: _without_options(layer.forward, self._reading) for module, layer in self._layers.items()
        }
        if output := getattr(self.built.model, "output_layer", None):  # of the last pipeline stage
            forwards[output] = _of_last(output.forward, self._reading)
        for module, forward in forwards.items():
            module.forward = forward  # hides the method of the class
        try:
            yield
        finally:
            for module in forwards:
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
        internals.without_low_precision(built.model),
        decoder.attached(),
    ):
        yield decoder


def _only(logits: Tensor | None) -> Tensor | None:
    """Logits (rows, 1, vocabulary) as (rows, vocabulary)."""
    return None if logits is None else logits[:, 0]


def _without_options(forward: Callable[..., Any], reading: Reading) -> Callable[..., Any]:
    """The layer's forward as megatron-core calls it: masks and packed sequences play no part in decoding."""

    def call(*tensors: Tensor | None, **_: Any) -> Any:
        return forward(reading, *(tensor for tensor in tensors if tensor is not None))

    return call


def _of_last(forward: Callable[..., Any], reading: Reading) -> Callable[..., Any]:
    """The output layer's forward, for the tokens whose logits are asked for.

    The logits of 8,192 tokens over a vocabulary of 131,072 take 6 GB, in bf16 and in float32.
    """

    def call(hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        return forward(reading.of_last(hidden) if reading.last else hidden, *arguments, **options)

    return call
