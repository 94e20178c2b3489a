"""Micro-batches as a pure function of the sample numbers, so that a resumed run sees the same data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from snaketron.data import blend_sft
from snaketron.data.index import load
from snaketron.data.mixing import mix
from snaketron.data.packed import Pack, PackedDataset
from snaketron.data.tokenizer import Info
from snaketron.log import logger
from snaketron.model import backend
from snaketron.settings import TrainSettings

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_batch_on_this_cp_rank

PACK_CACHE = 2**28  # bytes of decoded packs that a split keeps
Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
Batch = dict[str, Any]  # keyword arguments of the model, and loss_mask


class Batches:
    """The data of a training. Subclasses say how many samples there are and how some make a batch."""

    def __init__(self, micro_batch_size: int) -> None:
        self.micro_batch_size = micro_batch_size

    def has(self, split: Split) -> bool:
        raise NotImplementedError

    def collate(self, split: Split, indices: Sequence[int]) -> Batch:
        raise NotImplementedError

    def micro_batches(self, split: Split, first: int, count: int) -> Iterator[Batch]:
        """This rank's share of samples [first, first + count), a micro-batch at a time.

        `count` is a multiple of micro_batch_size x data parallel size. Tensors are (batch, length) on the
        device; under context parallelism they hold this rank's part of each sequence.
        """
        ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        order = np.arange(first, first + count).reshape(-1, ranks, self.micro_batch_size)[:, rank]
        for indices in order:
            yield self.collate(split, [int(i) for i in indices])

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
        keys = ("tokens", "labels", "loss_mask", "position_ids")
        batch = {key: torch.stack([row[key] for row in rows]).to(backend.device()) for key in keys}
        if parallel_state.get_context_parallel_world_size() > 1:
            batch = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False)
        return {"input_ids": batch.pop("tokens"), **batch}


class SftBatches(Batches):
    """Packs of conversations, mixed by weight; padding up to the pack size is a sequence of its own."""

    def __init__(
        self,
        blend: Path,
        settings: TrainSettings,
        tokenizer: Info,
        template_sha256: str,
        *,
        eval_samples: int,
    ) -> None:
        super().__init__(micro_batch_size=1)
        self.pack_size, self.pad_id = settings.seq_length, tokenizer.pad_id
        expected = {
            "tokenizer_sha256": tokenizer.sha256,
            "template_sha256": template_sha256,
            "pack_size": settings.seq_length,
        }
        loaded = blend_sft.check(blend, **expected)
        held_out = self.round_up(eval_samples)
        samples = {
            "train": settings.train_iters * settings.global_batch_size,
            "valid": held_out,
            "test": held_out,
        }
        self.packs: dict[Split, list[PackedDataset]] = {}
        self.order: dict[Split, tuple[np.ndarray, np.ndarray]] = {}
        for split in SPLITS:
            sources = loaded.splits[split]
            room = PACK_CACHE // max(1, len(sources))
            self.packs[split] = [PackedDataset(s.files, expected, cache_bytes=room) for s in sources]
            if sources:
                sizes, weights = [len(p) for p in self.packs[split]], [source.weight for source in sources]
                self.order[split] = mix(sizes, weights, samples[split], settings.seed)
            else:
                logger.info("no packs in the %s split", split)

    def has(self, split: Split) -> bool:
        return bool(self.packs[split])

    def collate(self, split: Split, indices: Sequence[int]) -> Batch:
        (index,) = indices
        sources, samples = self.order[split]
        return collate_pack(
            self.packs[split][sources[index]][int(samples[index])], self.pack_size, self.pad_id
        )


def collate_pack(pack: Pack, pack_size: int, pad_id: int) -> Batch:
    """A pack as the model takes it: shapes (1, pack_size), and where its sequences begin.

    Labels are the next token of the same conversation; the last position of one has the padding id and a
    loss mask of 0. `padding_mask` is true at padding, so that the routers leave it out; sequence parallelism
    gives each rank its part of it, as of the hidden states.
    """
    length, device = len(pack.input_ids), backend.device()
    if length > pack_size:
        raise AssertionError(f"a pack of {length} tokens where the footer says {pack_size}")
    starts = [*pack.seq_start_id.tolist(), length, *([pack_size] if length < pack_size else [])]
    tokens = np.full(pack_size, pad_id, dtype=np.int64)
    labels, loss_mask = tokens.copy(), np.zeros(pack_size, dtype=np.float32)
    tokens[:length] = pack.input_ids
    labels[: length - 1] = pack.input_ids[1:]
    labels[np.asarray(starts[1:-1], dtype=np.int64) - 1] = pad_id
    loss_mask[:length] = pack.loss_mask
    ends = torch.tensor(starts, dtype=torch.int32, device=device)
    longest = int(np.diff(starts).max())
    positions = np.concatenate([np.arange(n) for n in np.diff(starts)])

    ranks = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()

    def row(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values)[None].to(device)

    return {
        "input_ids": row(tokens),
        "labels": row(labels),
        "loss_mask": row(loss_mask),
        "position_ids": row(positions),
        "padding_mask": row(np.arange(pack_size) >= length).chunk(ranks, dim=1)[rank],
        "packed_seq_params": PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            total_tokens=pack_size,
        ),
    }
