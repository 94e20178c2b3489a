"""Rendered chats into packs, one split at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snaketron.data import packed, packing, rendered
from snaketron.log import UserError

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class Chats:
    """A file of rendered chats in memory (5 bytes a token)."""

    input_ids: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray  # where each conversation begins, and the end
    splits: np.ndarray
    metadata: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Chats:
        _, metadata = packed.read_footer(path, rendered.SCHEMA.names)
        try:
            with pq.ParquetFile(path) as file:  # pq.read_table imports pandas: 1 s
                table = file.read()
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}: cannot be read ({error}); delete it and run again") from None
        input_ids, offsets = packed.flatten(table.column("input_ids"))
        loss_mask, _ = packed.flatten(table.column("loss_mask"))
        splits = np.array(table.column("split").to_pylist(), dtype="<U5")
        return cls(input_ids, loss_mask, offsets, splits, metadata)

    def conversation(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        place = slice(self.offsets[index], self.offsets[index + 1])
        return self.input_ids[place], self.loss_mask[place]


def pack_split(chats: Chats, split: str, path: Path, *, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Write the packs of one split to `path`; returns its counts."""
    pack_size = metadata["pack_size"]
    chosen: list[int] = []
    dropped: Counter[str] = Counter()
    indices = np.flatnonzero(chats.splits == split).tolist()
    for index in indices:
        input_ids, loss_mask = chats.conversation(index)
        if len(input_ids) > pack_size:
            dropped["longer than a pack"] += 1
        elif not loss_mask[1:].any():  # nothing predicts the first token
            dropped["nothing to train on"] += 1
        else:
            chosen.append(index)
    lengths = np.diff(chats.offsets)[chosen].tolist()
    bins = packing.pack(lengths, pack_size, metadata["algorithm"])
    tokens = sum(lengths)
    counts: dict[str, Any] = {
        "conversations": len(indices),
        "packed": len(chosen),
        "dropped": dict(dropped),
        "packs": len(bins),
        "tokens": tokens,
        "trained_tokens": sum(int(chats.conversation(i)[1][1:].sum()) for i in chosen),
        "efficiency": round(tokens / (len(bins) * pack_size), 4) if bins else 0.0,
    }
    packs = (packed.join([chats.conversation(chosen[item]) for item in items]) for items in bins)
    packed.write(path, packs, {**metadata, "split": split, "counts": counts})
    return counts
