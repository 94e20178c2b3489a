"""Micro-batches as a pure function of the sample numbers, so that a resumed run sees the same data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from snaketron.config import Parallel
from snaketron.data.chats import blend as blend_sft
from snaketron.data.chats.mixing import mix
from snaketron.data.chats.packs import Pack, PackedDataset, loss_weights
from snaketron.data.text.index import load
from snaketron.data.tokenizer import Info
from snaketron.log import UserError, logger
from snaketron.model import backend
from snaketron.model.megatron import packed
from snaketron.settings.training import TrainSettings

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

PACK_CACHE = 2**28  # bytes of decoded packs that a split keeps
Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
Batch = dict[str, Any]  # keyword arguments of the model, and `report`

# What is summed up of each source, over ranks and steps.
SUMS = ("loss", "trained_tokens", "sample_loss", "conversations", "tokens", "packs")


@dataclass(frozen=True)
class Report:
    """What a micro-batch adds to the metrics of its source.

    `weights` (2, batch, length) give each position's share of `loss` (1 if trained) and of `sample_loss` (1 a
    conversation); `counts` are the other four of `SUMS`. Under context parallelism the parts of the ranks add
    up.
    """

    weights: torch.Tensor
    counts: tuple[float, float, float, float]
    source: int = 0
    num_sources: int = 1

    @property
    def tokens(self) -> int:
        """Positions of this rank that are not padding."""
        return int(self.counts[2])

    def sums(self, losses: torch.Tensor) -> torch.Tensor:
        """`SUMS` by source (sources, 6), float64, of the loss of each position (batch, length)."""
        sums = torch.zeros(self.num_sources, len(SUMS), dtype=torch.float64, device=losses.device)
        sums[self.source, 0:3:2] = (losses.detach() * self.weights).sum((1, 2)).double()
        for column, count in zip((1, 3, 4, 5), self.counts, strict=True):
            sums[self.source, column] = count  # one by one: a tensor of them would make the host wait
        return sums


class Batches:
    """The data of a training. Subclasses say how many samples there are and how some make a batch."""

    sources: tuple[str, ...] = ()  # by which metrics are reported, beside their sum

    def __init__(self, micro_batch_size: int) -> None:
        self.micro_batch_size = micro_batch_size

    def has(self, split: Split) -> bool:
        raise NotImplementedError

    def collate(self, split: Split, indices: Sequence[int]) -> Batch:
        raise NotImplementedError

    def share(self, first: int, count: int) -> np.ndarray:
        """This rank's part of samples [first, first + count): shape (micro-batches, micro_batch_size)."""
        ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        return np.arange(first, first + count).reshape(-1, ranks, self.micro_batch_size)[:, rank]

    def micro_batches(self, split: Split, first: int, count: int) -> Iterator[Batch]:
        """This rank's share of samples [first, first + count), a micro-batch at a time.

        `count` is a multiple of micro_batch_size x data parallel size. Tensors are (batch, length) on the
        device, and `loss_mask` (1 + MTP depths, batch, length) has the weight of each position's losses:
        their weighted sum over a step, divided by its tokens, is what is minimized. Under context parallelism
        they hold this rank's part of each sequence.
        """
        for indices in self.share(first, count):
            yield self.collate(split, [int(i) for i in indices])

    def wanted(self) -> dict[str, tuple[float, int]]:
        """By source the share of the samples that it should have, and how many there are of it."""
        return {}

    def round_up(self, samples: int) -> int:
        """The next number of samples that every data parallel rank can share evenly."""
        multiple = self.micro_batch_size * parallel_state.get_data_parallel_world_size()
        return -(-samples // multiple) * multiple


class PretrainBatches(Batches):
    """Sequences of the blended corpora, by megatron-core's own data sets over memory maps."""

    def __init__(
        self,
        blend: Path,
        settings: TrainSettings,
        tokenizer: Info,
        *,
        index: Path,
        micro_batch_size: int,
        eval_samples: int,
    ) -> None:
        super().__init__(micro_batch_size)
        self.depths = settings.model.mtp_num_layers
        self.datasets = load(
            index,
            blend,
            tokenizer,
            seed=settings.seed,
            seq_length=settings.seq_length,
            train_samples=settings.train_iters * settings.global_batch_size,
        )
        for split, (_, samples) in self.datasets.items():
            if split != "train" and samples < eval_samples:
                logger.info(
                    "%s has %d sequences; the eval_samples %d read some again", split, samples, eval_samples
                )

    def has(self, split: Split) -> bool:
        return split in self.datasets

    def collate(self, split: Split, indices: Sequence[int]) -> Batch:
        dataset, samples = self.datasets[split]
        rows = [dataset[i % samples] for i in indices]  # a held-out split may be smaller than eval_samples
        keys = ("tokens", "labels", "position_ids")
        batch = {key: torch.stack([row[key] for row in rows]) for key in keys}
        return sequences(batch.pop("tokens"), batch.pop("labels"), batch.pop("position_ids"), self.depths)


def sequences(
    input_ids: torch.Tensor, labels: torch.Tensor, position_ids: torch.Tensor, depths: int
) -> Batch:
    """A micro-batch of whole sequences (batch, length) in which every token is trained, on the device."""
    batch, length = input_ids.shape
    weights = torch.ones(1 + depths, batch, length)
    for depth in range(1, 1 + depths):
        weights[depth, :, length - depth :] = 0  # what they would predict is in no sequence
        weights[depth] *= length / max(1, length - depth)
    tensors = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, "loss_mask": weights}
    ranks, rank = (
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_context_parallel_rank(),
    )
    if ranks > 1:
        part = packed.partition(torch.tensor([0, length]), length, ranks, rank)
        tensors = {name: tensor[..., part] for name, tensor in tensors.items()}
    on_device: Batch = {name: to_device(tensor) for name, tensor in tensors.items()}
    tokens = batch * length / ranks
    here = on_device["loss_mask"][:1]
    on_device["report"] = Report(
        torch.cat([here, here / length]), (tokens, batch / ranks, tokens, batch / ranks)
    )
    return on_device


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor where this process computes; from pinned memory, which the host need not wait for."""
    device = backend.device()
    if device.type == "cpu" or tensor.device == device:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


class SftBatches(Batches):
    """Packs of conversations, mixed by weight; padding up to the pack size is a sequence of its own."""

    def __init__(self, blend: Path, settings: TrainSettings, tokenizer: Info, *, eval_samples: int) -> None:
        super().__init__(micro_batch_size=1)
        self.settings = settings
        self.pack_size, self.pad_id = settings.seq_length, tokenizer.pad_id
        ranks = parallel_state.get_context_parallel_world_size()
        self.multiple = Parallel(context_parallel_size=ranks).sequence_multiple
        expected: dict[str, Any] = {"tokenizer_sha256": tokenizer.sha256, "pack_size": settings.seq_length}
        loaded = blend_sft.check(blend, **expected)
        if loaded.padding_multiple % self.multiple:
            raise UserError(
                f"{blend}: the packs have room for conversations padded to a multiple of "
                f"{loaded.padding_multiple}, and context_parallel_size {ranks} needs one of {self.multiple}; "
                f"set sft_data.padding_multiple to {self.multiple} and run the workflow again to pack anew"
            )
        expected["padding_multiple"] = loaded.padding_multiple
        held_out = self.round_up(eval_samples)
        samples = {
            "train": settings.train_iters * settings.global_batch_size,
            "valid": held_out,
            "test": held_out,
        }
        self._reader = ThreadPoolExecutor(1, "packs")  # one thread, since the caches are for one
        self._reading: dict[tuple[Split, int, int], Future[Any]] = {}
        self.sources = tuple(source.source for source in loaded.splits["train"])
        self.weights = {source.source: source.weight for source in loaded.splits["train"]}
        self.names: dict[Split, list[str]] = {}
        self.packs: dict[Split, list[PackedDataset]] = {}
        self.order: dict[Split, tuple[np.ndarray, np.ndarray]] = {}
        for split in SPLITS:
            sources = loaded.splits[split]
            room = PACK_CACHE // max(1, len(sources))
            self.names[split] = [source.source for source in sources]
            self.packs[split] = [
                PackedDataset(s.files, expected | {"template_sha256": s.template_sha256}, cache_bytes=room)
                for s in sources
            ]
            if sources:
                sizes, weights = [len(p) for p in self.packs[split]], [source.weight for source in sources]
                self.order[split] = mix(sizes, weights, samples[split], settings.seed)
                if split != "train":
                    _each_source(self.order[split][0], self.order[split][1], len(sources))
            else:
                logger.info("no packs in the %s split", split)
        trained = np.bincount(self.order["train"][0], minlength=len(self.sources))
        for (name, (weight, packs)), count in zip(self.wanted().items(), trained.tolist(), strict=True):
            logger.info(
                "%s: %d of %d packs to train on (%.2f %%, wanted %.2f %%), %.2f epochs of its %d",
                name,
                count,
                samples["train"],
                100 * count / samples["train"],
                100 * weight,
                count / packs,
                packs,
            )
        if self.has("valid"):
            seen = set(self.order["valid"][0].tolist())
            unseen = [name for i, name in enumerate(self.names["valid"]) if i not in seen]
            if unseen:
                logger.warning(
                    "validation has no pack of %s: raise eval_samples (now %d) to the number of sources",
                    ", ".join(unseen),
                    eval_samples,
                )

    def has(self, split: Split) -> bool:
        return bool(self.packs[split])

    def wanted(self) -> dict[str, tuple[float, int]]:
        return {
            name: (self.weights[name], len(p))
            for name, p in zip(self.sources, self.packs["train"], strict=True)
        }

    def pack(self, split: Split, index: int) -> tuple[int, Pack]:
        """Number of the source, among `sources`, and the pack of a sample."""
        sources, samples = self.order[split]
        source = sources[index]
        pack = self.packs[split][source][int(samples[index])]
        return self.sources.index(self.names[split][source]), pack

    def average(self, sample: int) -> Literal["token", "sample"]:
        """How the loss of the step that trains a sample is averaged."""
        chosen, after = self.settings.loss_average, self.settings.switch_loss_average_after
        if after is not None and sample // self.settings.global_batch_size >= after:
            return "sample" if chosen == "token" else "token"
        return chosen

    def _read(
        self, split: Split, first: int, count: int
    ) -> tuple[list[tuple[int, Pack]], list[np.ndarray], np.ndarray]:
        """This rank's packs of a step, the weights of their positions, and what they add to the numbers that
        divide the sums (`loss_weights`) and to the tokens."""
        packs = [self.pack(split, int(i)) for i in self.share(first, count).flatten()]
        average, depths = self.average(first), self.settings.model.mtp_num_layers
        weights, totals = zip(*(loss_weights(pack, depths, average) for _, pack in packs), strict=True)
        tokens = sum(len(pack.input_ids) for _, pack in packs)
        return packs, list(weights), np.append(np.sum(totals, axis=0), tokens)

    def micro_batches(self, split: Split, first: int, count: int) -> Iterator[Batch]:
        """As in the base class. Every rank takes part: the averages are over the whole step.

        A step's packs are read before its first micro-batch, since what a token counts depends on all, and
        while the step before it is computed.
        """
        ahead = self._reading.pop((split, first, count), None)
        packs, weighted, totals = (ahead or self._reader.submit(self._read, split, first, count)).result()
        if split == "train" and first + 2 * count <= len(self.order[split][0]):
            following = (split, first + count, count)
            self._reading = {following: self._reader.submit(self._read, *following)}
        shared = torch.from_numpy(totals).to(backend.device())
        torch.distributed.all_reduce(shared, group=parallel_state.get_data_parallel_group())
        *numbers, tokens = shared.tolist()
        factors = np.array([[tokens / number if number else 0.0] for number in numbers], dtype=np.float32)
        for (source, pack), weights in zip(packs, weighted, strict=True):
            yield collate_pack(
                pack,
                self.pack_size,
                self.pad_id,
                multiple=self.multiple,
                weights=weights * factors,
                source=source,
                num_sources=len(self.sources),
            )


def _each_source(source_index: np.ndarray, sample_index: np.ndarray, count: int) -> None:
    """Put the first sample of each source that has none in place of the last samples of the commonest one, as
    far as no other source loses its only sample to it."""
    for source in range(count):
        numbers = np.bincount(source_index, minlength=count)
        if not numbers[source] and numbers.max() > 1:
            place = np.flatnonzero(source_index == numbers.argmax())[-1]
            source_index[place], sample_index[place] = source, 0


def collate_pack(
    pack: Pack,
    pack_size: int,
    pad_id: int,
    *,
    weights: np.ndarray,
    multiple: int = 1,
    source: int = 0,
    num_sources: int = 1,
) -> Batch:
    """A pack as the model takes it: shapes (1, pack_size), and where its sequences begin.

    Each conversation is padded to a `multiple`, and the pack to its size. Labels are the next token of the
    same conversation; the last position of one has the padding id and counts nothing. `weights` (1 + MTP
    depths, tokens) become the `loss_mask`. `padding_mask` is true at padding, so that the routers leave it
    out; sequence parallelism gives each rank its part of it, as of the hidden states.
    """
    places, starts = pack.places(multiple)
    if starts[-1] > pack_size:
        raise AssertionError(f"a pack of {starts[-1]} tokens where the footer says {pack_size}")
    if starts[-1] < pack_size:
        starts = np.append(starts, pack_size)
    token_weights, _ = loss_weights(pack, 0, "token")
    sample_weights, (conversations,) = loss_weights(pack, 0, "sample")

    def spread(values: np.ndarray, fill: float) -> torch.Tensor:
        """Values of the tokens (..., tokens) in their places, as (..., 1, pack_size)."""
        row = np.full((*values.shape[:-1], 1, pack_size), fill, dtype=values.dtype)
        row[..., 0, places] = values
        return torch.from_numpy(row)

    labels = np.append(pack.input_ids[1:], pad_id).astype(np.int64)
    labels[pack.seq_start_id[1:] - 1] = pad_id
    rows = {
        "input_ids": spread(pack.input_ids.astype(np.int64), pad_id),
        "labels": spread(labels, pad_id),
        "loss_mask": spread(weights, 0.0),
        "padding_mask": spread(np.zeros(len(places), dtype=bool), True),
        "position_ids": torch.from_numpy(np.arange(pack_size) - np.repeat(starts[:-1], np.diff(starts)))[
            None
        ],
        "report": spread(np.concatenate([token_weights, sample_weights]), 0.0),
    }
    ends = torch.from_numpy(starts.astype(np.int32))
    context, rank = (
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_context_parallel_rank(),
    )
    if context > 1:
        part = packed.partition(ends, pack_size, context, rank)
        rows = {name: tensor[..., part] for name, tensor in rows.items()}
    here = int((~rows["padding_mask"]).sum())
    counts = (float(rows["report"][0].sum()), conversations / context, here, 1 / context)
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    rows["padding_mask"] = rows["padding_mask"].chunk(
        parallel_state.get_tensor_model_parallel_world_size(), dim=1
    )[tensor_rank]
    batch: Batch = {name: to_device(tensor) for name, tensor in rows.items()}
    longest = int(np.diff(starts).max())
    ends = to_device(ends)
    batch["report"] = Report(batch["report"], counts, source, num_sources)
    batch["packed_seq_params"] = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        total_tokens=pack_size,
    )
    return batch
