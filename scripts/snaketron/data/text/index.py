"""Megatron's data set index of a blend: which documents, from which token on, make which sample.

It is built once, by a job without a GPU, and ranks only read it. What it holds follows from the blend, the
seed, the sequence length and the number of training samples, and from nothing about how a training is run.
More samples begin with the same ones, so a training can be prolonged. File names are megatron-core's: hashes
over the paths of the shards, among others.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import resource
import shutil
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import snaketron.model  # noqa: F401  before megatron
from snaketron import files
from snaketron.data.text.blend import BlendedSplit, PretrainBlend, check_blend
from snaketron.data.tokenizer import Info
from snaketron.lineage.record import Entry, Record, making
from snaketron.lineage.walk import record_about
from snaketron.log import UserError
from snaketron.settings.training import IndexSettings
from snaketron.sizes.epochs import epochs, shares

import numpy as np
from megatron.core.datasets import helpers
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

HELD_OUT_SAMPLES = 1 << 16
_AT_ONCE = 1 << 24
OPEN_FILES = 6  # for each shard that is read: 2 for its text, 1 for its .idx, 3 for the index
SPARE_FILES = 500  # for everything else that a training opens


def num_samples(blend: PretrainBlend, settings: IndexSettings) -> dict[str, int]:
    """The number of samples of each split: `train_samples` of train, and one epoch of valid and test.

    Valid and test have at most `HELD_OUT_SAMPLES`: no validation reads more.
    """
    held_out = {
        split: min(max(1, (getattr(blend, split).tokens - 1) // settings.seq_length), HELD_OUT_SAMPLES)
        for split in ("valid", "test")
    }
    return {"train": settings.train_samples} | held_out


# ------------------------------------------------------------------------------------------- building


def build(blend_path: Path, settings: IndexSettings, *, output: Path, record: Path) -> Record:
    """Write the directory `output`, then its `record`; returns the record.

    Shards are indexed one after the other; one takes up to 20 bytes of memory for each document and epoch.
    """
    blend = check_blend(blend_path)
    told = _told(blend_path, settings)
    building = files.partial(output)
    with making("index", blend.phase, outputs={}, record=record) as job, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core warns that it is not told its rank
        try:
            shutil.rmtree(building, ignore_errors=True)
            building.mkdir(parents=True)
            config = _config(blend, settings, building, _Tokenizer(blend.tokenizer))
            counts = {
                split: _build_split(blend, split, samples, config)
                for split, samples in num_samples(blend, settings).items()
            }
            content = _content(building)
            job.inputs, job.settings = {"blend": blend_path}, told
            job.counts = counts | {"files": content.pop("files")}
            job.present = [Entry("index", str(output), **content)]
            record.unlink(missing_ok=True)
            shutil.rmtree(output, ignore_errors=True)
            building.replace(output)
        except BaseException as error:
            shutil.rmtree(building, ignore_errors=True)
            # numpy's error says how much it has not written, and has no number.
            if isinstance(error, OSError) and error.errno is None:
                raise UserError(
                    f"cannot write {output}: {error}; free some space there and run the same command again"
                ) from error
            raise
    return job.record


def _build_split(
    blend: PretrainBlend, split: str, samples: int, config: GPTDatasetConfig
) -> dict[str, Any] | None:
    """Index a split; returns what it takes of each corpus, None for a split without tokens."""
    content: BlendedSplit = getattr(blend, split)
    if not content.prefixes:
        return None
    built = []
    for prefix, number in _shares(content, samples):
        text = IndexedDataset(prefix, mmap=False)
        tokens = int(text.sequence_lengths.sum())
        if split == "train" and (times := epochs(number, config.sequence_length, tokens)) > 1:
            built.append(_build_by_epoch(text, prefix, number, times, config))
            continue
        documents = np.arange(len(text), dtype=np.int32)
        dataset = GPTDataset(text, prefix, documents, number, Split[split], config)
        built.append(_Built(Split[split], dataset.unique_identifiers, len(dataset)))
    taken: Counter[str] = Counter({corpus.corpus: 0 for corpus in content.corpora})
    if len(built) == 1:
        taken[content.shards[0].corpus] = samples
    else:
        blended = BlendedDataset(built, content.weights, samples, config)
        for shard, number in zip(content.shards, _counts(blended.dataset_index, len(built)), strict=True):
            taken[shard.corpus] += number
    return {"samples": samples, "corpora": dict(taken)}


def _counts(numbers: np.ndarray, most: int) -> list[int]:
    """How often each number below `most` occurs; numpy would make 8 bytes of each of the 2 at once."""
    parts = (numbers[i : i + _AT_ONCE] for i in range(0, len(numbers), _AT_ONCE))
    return sum((np.bincount(part, minlength=most) for part in parts), np.zeros(most, np.int64)).tolist()


def _build_by_epoch(
    text: IndexedDataset, prefix: str, number: int, times: int, config: GPTDatasetConfig
) -> _Built:
    """Index a shard that is read `times` times, where each epoch is shuffled by itself.

    megatron-core shuffles all epochs together, so one more would change the order of all. Its files are
    written here with another content. The first epoch is as megatron-core has it where there is no second.
    """
    reading = dataclasses.replace(config, fast_cache_load=True, defer_npy_index_mmap=True)
    dataset = GPTDataset(text, prefix, None, number, Split.train, reading)
    lengths, seq_length = text.sequence_lengths, config.sequence_length
    tokens = int(lengths.sum())
    random = np.random.RandomState(config.random_seed)
    documents, order, first = [], [], 0
    for epoch in range(1, times + 1):
        documents.append(np.arange(len(text), dtype=np.int32))
        random.shuffle(documents[-1])
        # The samples that end within the epochs so far; the label of the last token is needed too.
        end = (epoch * tokens - 1) // seq_length
        order.append(np.arange(first, end, dtype=np.int64 if end >= 2**32 - 1 else np.uint32))
        random.shuffle(order[-1])
        first = end
    document_index = np.concatenate(documents)
    sample_index = helpers.build_sample_idx(lengths, document_index, seq_length, times, tokens, True, True)
    assert len(sample_index) == first + 1
    arrays = {"document": document_index, "sample": sample_index, "shuffle": np.concatenate(order)}
    for name, array in arrays.items():
        np.save(getattr(dataset, f"path_to_{name}_index"), array, allow_pickle=True)
    description = dataset.path_to_document_index.replace("document_index.npy", "description.txt")
    Path(description).write_text(dataset.unique_description, encoding="utf-8")
    return _Built(Split.train, dataset.unique_identifiers, first)


@dataclass(frozen=True)
class _Built:
    """The part of a data set that BlendedDataset asks for; the rest need not stay in memory."""

    index_split: Split
    unique_identifiers: Mapping[str, Any]
    length: int

    def __len__(self) -> int:
        return self.length


def _shares(content: BlendedSplit, samples: int) -> list[tuple[str, int]]:
    """The prefix of each shard, and the most samples that the first `samples` of the blend take from it."""
    return list(zip(content.prefixes, shares(content.weights, samples), strict=True))


def _content(directory: Path) -> dict[str, Any]:
    """Hash and size of all files of a directory together."""
    paths = [path for path in directory.iterdir() if path.is_file()]
    return {
        "sha256": files.directory_sha256(directory),
        "bytes": sum(path.stat().st_size for path in paths),
        "files": len(paths),
    }


def _told(blend_path: Path, settings: IndexSettings) -> dict[str, Any]:
    return {"blend": files.sha256(blend_path), **settings.model_dump()}


class _Tokenizer:
    """The attributes that GPTDataset reads from a tokenizer."""

    def __init__(self, sha256: str, info: Info | None = None) -> None:
        self.unique_identifiers = {"sha256": sha256}
        self.eod, self.pad = (info.eos_id, info.pad_id) if info else (0, -1)
        self.vocab_size = info.vocab_size if info else None


def _config(
    blend: PretrainBlend,
    settings: IndexSettings,
    directory: Path,
    tokenizer: _Tokenizer,
    **reading: bool,
) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=settings.seed,
        sequence_length=settings.seq_length,
        blend_per_split=blend.blend_per_split,
        tokenizer=tokenizer,
        path_to_cache=str(directory),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        **reading,
    )


# -------------------------------------------------------------------------------------------- reading


def load(
    directory: Path, blend_path: Path, tokenizer: Info, settings: IndexSettings
) -> dict[str, tuple[Any, int]]:
    """The data set of each split that has tokens, and its number of samples. Nothing is built.

    Files are opened when a sample is read from them. Raises `UserError` when the blend was made with
    another tokenizer, or when the index is not there or was made for another blend or training.
    """
    blend = check_blend(blend_path)
    if blend.tokenizer != tokenizer.sha256:
        raise UserError(
            f"{blend_path}: made with another tokenizer (sha256 {blend.tokenizer[:12]}, "
            f"and {tokenizer.sha256[:12]} is wanted); remove it and run again"
        )
    _check(directory, _told(blend_path, settings))
    _allow_open_files(len(blend.train.shards))
    config = _config(
        blend,
        settings,
        directory,
        _Tokenizer(blend.tokenizer, tokenizer),
        fast_cache_load=True,
        defer_npy_index_mmap=True,
    )
    found = {}
    for split, samples in num_samples(blend, settings).items():
        content: BlendedSplit = getattr(blend, split)
        datasets = [
            GPTDataset(_Text(prefix), prefix, None, number, Split[split], config)
            for prefix, number in _shares(content, samples)
        ]
        if len(datasets) > 1:
            found[split] = BlendedDataset(datasets, content.weights, samples, config), samples
        elif datasets:
            found[split] = datasets[0], samples
    return found


def _check(directory: Path, settings: Mapping[str, Any]) -> None:
    record = record_about(directory)
    wanted = {**settings, "megatron-core": importlib.metadata.version("megatron-core")}
    made = {**record.settings, "megatron-core": record.versions["megatron-core"]}
    differ = [f"{key} {made[key]}, not {value}" for key, value in wanted.items() if made[key] != value]
    if differ:
        raise UserError(f"{directory}: made with {'; '.join(differ)}; run rule index_pretrain again")
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; run rule index_pretrain")


def _allow_open_files(shards: int) -> None:
    """Raise the limit of open files as far as this process may; `UserError` when that is not enough."""
    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    needed = OPEN_FILES * shards + SPARE_FILES
    if limit != resource.RLIM_INFINITY and needed > limit:
        raise UserError(
            f"{shards} shards are in train, and reading them takes {needed} open files, where a process may "
            f"have {limit}: raise the hard limit (ulimit -Hn), or set pretrain_data.shard_size"
        )


class _Text:
    """The text of a shard, opened when it is read: a blend may have thousands of them."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    @functools.cached_property
    def opened(self) -> IndexedDataset:
        return IndexedDataset(self.prefix)

    def get(self, *place: Any, **part: Any) -> np.ndarray:
        return self.opened.get(*place, **part)
