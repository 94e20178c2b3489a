"""Micro-batches of packed conversations, as a pure function of the sample numbers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from snaketron.config import Parallel
from snaketron.config.data import Split
from snaketron.data.chats.blend import check_packed_blend
from snaketron.data.chats.mixing import mix
from snaketron.data.chats.packs import Pack, PackedDataset, loss_weights
from snaketron.data.tokenizer import Info
from snaketron.log import UserError, logger
from snaketron.model import backend
from snaketron.settings.training import TrainSettings
from snaketron.sizes.recording import SHORTEST_RECORDED
from snaketron.train.batches import Batches, context_part, to_device
from snaketron.train.losses import Batch, Counts, Report

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

PACK_CACHE = 2**28  # bytes of decoded packs that a split keeps
# What multi-token prediction sees behind the last token of a sequence, so that it sees no more in layouts
# that pad each conversation.
PADDING_ID = 0
FEWEST_SEQUENCES = 8  # of a pack, as attention is told; those that it lacks are empty


@dataclass(frozen=True)
class MixedPacks:
    """The packs of a split by source, and the order in which they come.

    Sample i is pack `packs[i]` of source `sources[i]`; both are empty in a split without sources.
    """

    names: list[str]
    datasets: list[PackedDataset]
    sources: np.ndarray
    packs: np.ndarray

    @property
    def num_samples(self) -> int:
        """Samples of the split; each is a pack."""
        return len(self.sources)


class Step(NamedTuple):
    """What a data parallel rank reads of a step."""

    packs: list[tuple[int, Pack]]  # the number of the source among `sources`, and the pack
    weights: list[np.ndarray]  # of each position of each pack (1 + MTP depths, tokens), before the average
    totals: np.ndarray  # what divides the sums of each depth (`loss_weights`), and last the tokens


class SftBatches(Batches):
    """Packs of conversations, mixed by weight; padding up to the pack size is a sequence of its own."""

    def __init__(
        self,
        settings: TrainSettings,
        splits: dict[Split, MixedPacks],
        weights: dict[str, float],
    ) -> None:
        """`weights` has the share of each source that is trained, in the order of `splits["train"]`."""
        super().__init__(micro_batch_size=1)
        self.settings, self.splits, self.weights = settings, splits, weights
        # Those that are trained, and then those that are held out as a whole.
        held_out = (name for packs in splits.values() for name in packs.names)
        self.sources = tuple(dict.fromkeys([*weights, *held_out]))
        self._mean_lengths: dict[int, float] = {}  # by the first sample of a step
        self._reader = ThreadPoolExecutor(1, "packs")  # one thread, since the caches are for one
        self._reading: dict[tuple[Split, int, int], Future[Step]] = {}

    @classmethod
    def load(cls, blend: Path, settings: TrainSettings, tokenizer: Info, *, eval_samples: int) -> SftBatches:
        """The batches of a blend, after a check that its packs are what this training takes.

        Raises `UserError` where they are of another tokenizer, template or size, or have no room for the
        padding of context parallelism.
        """
        expected: dict[str, Any] = {"tokenizer_sha256": tokenizer.sha256, "pack_size": settings.seq_length}
        loaded = check_packed_blend(blend, **expected)
        _check_padding(blend, loaded.padding_multiple)
        expected["padding_multiple"] = loaded.padding_multiple
        ranks = parallel_state.get_data_parallel_world_size()
        held_out = -(-eval_samples // ranks) * ranks
        trained = settings.train_iters * settings.global_batch_size
        samples: dict[Split, int] = {"train": trained, "valid": held_out, "test": held_out}
        splits = {
            split: _mixed(split, loaded.splits[split], expected, number, settings.seed)
            for split, number in samples.items()
        }
        weights = {source.source: source.weight for source in loaded.splits["train"]}
        return cls(settings, splits, weights)

    def report(self, eval_samples: int) -> None:
        """Say how much of each source is trained, and which sources the validation does not see."""
        train = self.splits["train"]
        numbers = np.bincount(train.sources, minlength=len(self.weights)).tolist()
        for (name, (weight, packs)), count in zip(self.wanted().items(), numbers, strict=True):
            logger.info(
                "%s: source %s: %d of %d packs to train on (%.2f %%, wanted %.2f %%), %.2f epochs of its %d",
                self.settings.stage,
                name,
                count,
                train.num_samples,
                100 * count / train.num_samples,
                100 * weight,
                count / packs,
                packs,
            )
        valid = self.splits["valid"]
        seen = set(valid.sources.tolist())
        unseen = [name for i, name in enumerate(valid.names) if i not in seen]
        if unseen:
            logger.warning(
                "%s: validation has no pack of %s: raise eval_samples (now %d) to the number of sources",
                self.settings.stage,
                ", ".join(unseen),
                eval_samples,
            )

    def has(self, split: Split) -> bool:
        return bool(self.splits[split].datasets)

    def mean_length(self, first: int) -> float | None:
        return self._mean_lengths.pop(first)

    def wanted(self) -> dict[str, tuple[float, float]]:
        datasets = self.splits["train"].datasets
        return {
            name: (self.weights[name], len(packs)) for name, packs in zip(self.weights, datasets, strict=True)
        }

    def pack(self, split: Split, index: int) -> tuple[int, Pack]:
        """Number of the source, among `sources`, and the pack of a sample."""
        mixed = self.splits[split]
        source = mixed.sources[index]
        pack = mixed.datasets[source][int(mixed.packs[index])]
        return self.sources.index(mixed.names[source]), pack

    def average(self, sample: int) -> Literal["token", "sample"]:
        """How the loss of the step that trains a sample is averaged."""
        chosen, after = self.settings.loss_average, self.settings.switch_loss_average_after
        if after is not None and sample // self.settings.global_batch_size >= after:
            return "sample" if chosen == "token" else "token"
        return chosen

    def _read(self, split: Split, first: int, count: int) -> Step:
        packs = [self.pack(split, int(i)) for i in self.share(first, count).flatten()]
        average, depths = self.average(first), self.settings.model.mtp_num_layers
        weights, totals = zip(*(loss_weights(pack, depths, average) for _, pack in packs), strict=True)
        tokens = sum(len(pack.input_ids) for _, pack in packs)
        return Step(packs, list(weights), np.append(np.sum(totals, axis=0), tokens))

    def micro_batches(self, split: Split, first: int, count: int) -> Iterator[Batch]:
        """As in the base class. Every rank takes part: the averages are over the whole step.

        A step's packs are read before its first micro-batch, since what a token counts depends on all, and
        while the step before it is computed.
        """
        ahead = self._reading.pop((split, first, count), None)
        step = (ahead or self._reader.submit(self._read, split, first, count)).result()
        if split == "train" and first + 2 * count <= self.splits[split].num_samples:
            following = (split, first + count, count)
            self._reading = {following: self._reader.submit(self._read, *following)}
        if split == "train":
            squares = sum(float(np.square(pack.lengths, dtype=np.float64).sum()) for _, pack in step.packs)
            self._mean_lengths[first] = squares / (len(step.packs) * self.settings.seq_length)
        factors = _factors(step.totals)
        for (source, pack), weights in zip(step.packs, step.weights, strict=True):
            yield collate_pack(
                pack,
                self.settings.seq_length,
                multiple=_sequence_multiple(),
                weights=weights * factors,
                source=source,
                num_sources=len(self.sources),
            )


def _sequence_multiple() -> int:
    """What the length of every sequence must be a multiple of, in this layout."""
    ranks = parallel_state.get_context_parallel_world_size()
    return Parallel(context_parallel_size=ranks).sequence_multiple


def _check_padding(blend: Path, padding_multiple: int) -> None:
    multiple = _sequence_multiple()
    if padding_multiple % multiple:
        ranks = parallel_state.get_context_parallel_world_size()
        raise UserError(
            f"{blend}: the packs have room for conversations padded to a multiple of "
            f"{padding_multiple}, and context_parallel_size {ranks} needs one of {multiple}; "
            f"set sft_data.padding_multiple to {multiple} and run the workflow again to pack anew"
        )


def _mixed(split: Split, sources: list[Any], expected: dict[str, Any], samples: int, seed: int) -> MixedPacks:
    """The packs of a split's sources, which must be made as `expected`, mixed by weight."""
    room = PACK_CACHE // max(1, len(sources))
    datasets = [
        PackedDataset(s.files, expected | {"template_sha256": s.template_sha256}, cache_bytes=room)
        for s in sources
    ]
    if not sources:
        logger.info("no packs in the %s split", split)
        nothing = np.zeros(0, dtype=np.int64)
        return MixedPacks([], [], nothing, nothing)
    order = mix([len(d) for d in datasets], [source.weight for source in sources], samples, seed)
    if split != "train":
        _each_source(*order, len(sources))
    return MixedPacks([source.source for source in sources], datasets, *order)


def _each_source(source_index: np.ndarray, sample_index: np.ndarray, count: int) -> None:
    """Give each source without a sample its first one, in place of the last one of the commonest source.

    As far as no other source loses its only sample to it.
    """
    for source in range(count):
        numbers = np.bincount(source_index, minlength=count)
        if not numbers[source] and numbers.max() > 1:
            place = np.flatnonzero(source_index == numbers.argmax())[-1]
            source_index[place], sample_index[place] = source, 0


def _factors(totals: np.ndarray) -> np.ndarray:
    """What turns this rank's weights into those of the step's average: (1 + MTP depths, 1).

    A collective operation of the data parallel group, over which `totals` are summed. For that the host waits
    until the GPU has computed the step before; alone it need not.
    """
    if parallel_state.get_data_parallel_world_size() > 1:
        shared = torch.from_numpy(totals).to(backend.device())
        torch.distributed.all_reduce(shared, group=parallel_state.get_data_parallel_group())
        totals = shared.cpu().numpy()
    *numbers, tokens = totals.tolist()
    return np.array([[tokens / number if number else 0.0] for number in numbers], dtype=np.float32)


def collate_pack(
    pack: Pack,
    pack_size: int,
    *,
    weights: np.ndarray,
    multiple: int = 1,
    source: int = 0,
    num_sources: int = 1,
) -> Batch:
    """A pack as the model takes it: shapes (1, pack_size), and where its sequences begin.

    Each conversation is padded to a `multiple`, and the pack to its size. Labels are the next token of the
    same conversation; the last position of one has `PADDING_ID` and counts nothing. `weights` (1 + MTP
    depths, tokens) become the `loss_mask`. `padding_mask` is true at padding, so that the routers leave it
    out; sequence parallelism gives each rank its part of it, like its part of the hidden states.
    """
    places, starts = pack.places(multiple)
    if starts[-1] > pack_size:
        raise AssertionError(f"a pack of {starts[-1]} tokens where the footer says {pack_size}")
    if starts[-1] < pack_size:
        starts = np.append(starts, pack_size)
    rows = _rows(pack, places, starts, weights)
    rows = context_part(rows, torch.from_numpy(starts.astype(np.int32)))
    counts = _counts(pack, rows)
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    rows["padding_mask"] = rows["padding_mask"].chunk(ranks, dim=1)[rank]
    batch: Batch = {name: to_device(tensor) for name, tensor in rows.items()}
    batch["report"] = Report(
        batch["report"], to_device(counts.tensor()), to_device(torch.tensor([source])), num_sources
    )
    batch["packed_seq_params"] = _sequences(starts, multiple)
    return batch


def _rows(pack: Pack, places: np.ndarray, starts: np.ndarray, weights: np.ndarray) -> dict[str, torch.Tensor]:
    """The tensors of a whole pack, (..., 1, pack_size); token i is at `places[i]`.

    `report` (2, 1, pack_size) has the share of each position in the loss of a token and of a conversation.
    """
    pack_size = int(starts[-1])

    def spread(values: np.ndarray, fill: float) -> torch.Tensor:
        row = np.full((*values.shape[:-1], 1, pack_size), fill, dtype=values.dtype)
        row[..., 0, places] = values
        return torch.from_numpy(row)

    labels = np.append(pack.input_ids[1:], PADDING_ID).astype(np.int64)
    labels[pack.seq_start_id[1:] - 1] = PADDING_ID
    shares = [loss_weights(pack, 0, average)[0] for average in ("token", "sample")]
    positions = np.arange(pack_size) - np.repeat(starts[:-1], np.diff(starts))
    return {
        "input_ids": spread(pack.input_ids.astype(np.int64), PADDING_ID),
        "labels": spread(labels, PADDING_ID),
        "loss_mask": spread(weights, 0.0),
        "padding_mask": spread(np.zeros(len(places), dtype=bool), True),
        "position_ids": torch.from_numpy(positions)[None],
        "report": spread(np.concatenate(shares), 0.0),
    }


def _counts(pack: Pack, rows: dict[str, torch.Tensor]) -> Counts:
    """Counts of this rank's part of a pack: packs, conversations, tokens."""
    ranks = parallel_state.get_context_parallel_world_size()
    (conversations,) = loss_weights(pack, 0, "sample")[1]
    return Counts(
        trained_tokens=float(rows["report"][0].sum()),
        conversations=conversations / ranks,
        tokens=int((~rows["padding_mask"]).sum()),
        packs=1 / ranks,
    )


def _sequences(starts: np.ndarray, multiple: int) -> PackedSeqParams:
    """Where the sequences of a whole pack begin, for attention and Mamba layers.

    Sizes are rounded up, as far as the host sees them: cuDNN plans a kernel of attention for each number of
    sequences and each longest one, and a recording is of one of each. Sequences that are added are empty.
    """
    lengths, pack_size = np.diff(starts), int(starts[-1])
    number = max(FEWEST_SEQUENCES, _power_of_two(len(lengths)))
    longest = max(SHORTEST_RECORDED, _power_of_two(int(lengths.max())))
    longest = min(pack_size, -(-longest // multiple) * multiple)
    ends = np.append(starts, np.full(number - len(lengths), pack_size))
    numbers = np.repeat(np.arange(len(lengths)), lengths)
    on_device = to_device(torch.from_numpy(ends.astype(np.int32)))
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=on_device,
        cu_seqlens_kv=on_device,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        seq_idx=to_device(torch.from_numpy(numbers.astype(np.int32)[None])),
    )


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`, which is positive."""
    return 1 << (number - 1).bit_length()
