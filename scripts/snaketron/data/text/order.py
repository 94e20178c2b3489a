"""In which samples of a training a sequence of text is, by the index that the training read.

An index of megatron-core has for each shard three arrays: `document_index` is the order of its sequences over
all epochs, as one stream of tokens; `sample_index` says where in that order each sample begins; and sample i
of the shard is number shuffle_index[i] in the stream. A blend of several shards has two more: sample k of the
training is sample dataset_sample_index[k] of shard dataset_index[k]. They are read as they are, without
megatron-core, whose import takes 5 s.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from snaketron.log import UserError

import numpy as np
import orjson


class SampleOrder:
    """The index of the training split of a blend, in a directory that `index.build` wrote."""

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise UserError(f"{directory}: the index is not here any more; run rule index_pretrain")
        self.directory = directory
        self.prefixes: list[str] = []  # of the shards, by their number in the blend
        self._shards: dict[str, Path] = {}  # beginnings of file names, by the prefix of the shard
        blended = list(directory.glob("*-BlendedDataset-train-description.txt"))
        for path in directory.glob("*-GPTDataset-train-description.txt"):
            value = orjson.loads(path.read_bytes())
            self._shards[value["dataset_path"]] = path
            self.prefixes.append(value["dataset_path"])
        self._blended = blended[0] if blended else None
        if self._blended:
            value = orjson.loads(self._blended.read_bytes())
            self.prefixes = [shard["dataset_path"] for shard in value["datasets"]]
        if not self._shards:
            raise UserError(f"{directory}: not an index of a training; run rule index_pretrain again")

    def samples(self, prefix: str, sequences: Sequence[int]) -> np.ndarray:
        """The numbers of the training's samples that hold a token of some sequences, in rising order.

        A token counts that is an input or a label: a sample of n tokens holds n + 1, the last as a label.

        Args:
            prefix: of the shard's .bin, as the blend has it.
        """
        if prefix not in self._shards:
            return np.empty(0, np.int64)
        of_shard = self._of_shard(prefix, sequences)
        if not self._blended:
            return of_shard
        shards = self._load(self._blended, "dataset_index")
        numbers = self._load(self._blended, "dataset_sample_index")
        places = np.flatnonzero(shards == self.prefixes.index(prefix))
        return places[np.isin(numbers[places], of_shard)]

    def _of_shard(self, prefix: str, sequences: Sequence[int]) -> np.ndarray:
        """The samples of a shard that hold some of its sequences."""
        path = self._shards[prefix]
        documents = self._load(path, "document_index")
        begins = self._load(path, "sample_index")[:, 0]  # a sample ends in the sequence where the next begins
        in_stream = np.zeros(len(begins), bool)
        for place in np.flatnonzero(np.isin(documents, sequences)):
            first = np.searchsorted(begins[1:], place, side="left")
            last = np.searchsorted(begins[:-1], place, side="right")
            in_stream[first:last] = True
        return np.flatnonzero(in_stream[self._load(path, "shuffle_index")])

    def _load(self, description: Path, name: str) -> np.ndarray:
        path = description.with_name(description.name.replace("description.txt", f"{name}.npy"))
        try:
            return np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); run rule index_pretrain again") from None
