"""Micro-batches as a pure function of the sample numbers, so that a resumed training sees the same data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from snaketron.config.data import SPLITS, Split
from snaketron.data.text.blend import load_blend
from snaketron.data.text.index import load
from snaketron.data.tokenizer import Info
from snaketron.log import logger
from snaketron.model import backend
from snaketron.model.megatron import packed
from snaketron.settings.training import TrainSettings
from snaketron.train.losses import Batch, Counts, Report

import numpy as np
import torch
from megatron.core import parallel_state


class Batches:
    """The data of a training. Subclasses say how many samples there are and how some make a batch."""

    sources: tuple[str, ...] = ()  # by which metrics are reported, beside their sum
    mixed = False  # whether sequences of several of them share a micro-batch

    def __init__(self, micro_batch_size: int) -> None:
        self.micro_batch_size = micro_batch_size

    def has(self, split: Split) -> bool:
        """Whether a split has samples."""
        raise NotImplementedError

    def collate(self, split: Split, indices: Sequence[int]) -> Batch:
        """The micro-batch of the samples of these numbers; `micro_batches` has the shapes of its tensors."""
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

    def num_micro_batches(self, samples: int) -> int:
        """Micro-batches of each data parallel rank for this number of samples."""
        return samples // (self.micro_batch_size * parallel_state.get_data_parallel_world_size())

    def mean_length(self, first: int) -> float | None:
        """Tokens of the sequence of a token, in the mean over the step that begins with sample `first`.

        Padding is of no sequence. None where all are as long as the longest.
        """
        return None

    def wanted(self) -> dict[str, tuple[float, float]]:
        """By source the share of the samples that it should have, and how many there are of it."""
        return {}

    def round_up(self, samples: int) -> int:
        """The next number of samples that every data parallel rank can share evenly."""
        multiple = self.micro_batch_size * parallel_state.get_data_parallel_world_size()
        return -(-samples // multiple) * multiple


class PretrainBatches(Batches):
    """Sequences of the blended corpora, by megatron-core's own data sets over memory maps."""

    mixed = True

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
        content = load_blend(blend)
        self._wanted = {c.corpus: (c.share, c.tokens / settings.seq_length) for c in content.train.corpora}
        shards = {split: getattr(content, split).shards for split in SPLITS}
        # Those that are trained, and then those that are held out as a whole.
        held_out = (shard.corpus for split in SPLITS for shard in shards[split])
        self.sources = tuple(dict.fromkeys([*self._wanted, *held_out]))
        self._corpora = {  # by split, the corpus of each shard
            split: [self.sources.index(shard.corpus) for shard in shards[split]] for split in SPLITS
        }
        self.datasets = load(index, blend, tokenizer, settings.index)
        for split, (_, samples) in self.datasets.items():
            if split != "train" and samples < eval_samples:
                logger.info(
                    "%s: %s has %d sequences and eval_samples is %d, so some are read twice",
                    settings.stage,
                    split,
                    samples,
                    eval_samples,
                )

    def has(self, split: Split) -> bool:
        return split in self.datasets

    def wanted(self) -> dict[str, tuple[float, float]]:
        return self._wanted

    def collate(self, split: Split, indices: Sequence[int]) -> Batch:
        dataset, samples = self.datasets[split]
        rows = [dataset[i % samples] for i in indices]  # a held-out split may be smaller than eval_samples
        keys = ("tokens", "labels", "position_ids")
        batch = {key: torch.stack([row[key] for row in rows]) for key in keys}
        corpora = [self._corpora[split][row.get("dataset_id", 0)] for row in rows]  # none of a single shard
        return sequences(
            batch["tokens"],
            batch["labels"],
            batch["position_ids"],
            self.depths,
            sources=corpora,
            num_sources=len(self.sources),
        )


def sequences(
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    position_ids: torch.Tensor,
    depths: int,
    *,
    sources: Sequence[int] | None = None,
    num_sources: int = 1,
) -> Batch:
    """A micro-batch of whole sequences (batch, length) in which every token is trained, on the device.

    `sources` has the number of each one's source, if losses are reported by source.
    """
    batch, length = input_ids.shape
    weights = torch.ones(1 + depths, batch, length)
    for depth in range(1, 1 + depths):
        weights[depth, :, max(0, length - depth) :] = 0  # what they would predict is in no sequence
        weights[depth] *= length / max(1, length - depth)
    tensors = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, "loss_mask": weights}
    tensors = context_part(tensors, torch.tensor([0, length]))
    on_device: Batch = {name: to_device(tensor) for name, tensor in tensors.items()}
    ranks = parallel_state.get_context_parallel_world_size()
    tokens = batch * length / ranks
    here = on_device["loss_mask"][:1]
    on_device["report"] = Report(
        torch.cat([here, here / length]),
        to_device(Counts(tokens, batch / ranks, tokens, batch / ranks).tensor()),
        to_device(torch.tensor(sources or [0])),
        num_sources,
        mixed=sources is not None,
    )
    return on_device


def context_part(tensors: dict[str, torch.Tensor], ends: torch.Tensor) -> dict[str, torch.Tensor]:
    """This context parallel rank's part of tensors (..., length) whose sequences end at `ends`."""
    ranks = parallel_state.get_context_parallel_world_size()
    if ranks == 1:
        return tensors
    rank = parallel_state.get_context_parallel_rank()
    part = packed.partition(ends, int(ends[-1]), ranks, rank)
    return {name: tensor[..., part] for name, tensor in tensors.items()}


def to_device(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor where this process computes; from pinned memory, which the host need not wait for."""
    device = backend.device()
    if device.type == "cpu" or tensor.device == device:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
