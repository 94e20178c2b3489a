"""What a configuration takes on disk: raw files, tokens, packs and checkpoints, counted or estimated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from snaketron.config import Config
from snaketron.graph.planned import PlannedChats, PlannedCorpus, PlannedTraining
from snaketron.lineage.record import read
from snaketron.log import UserError
from snaketron.sources.lockfile import Lock
from snaketron.sources.pairs import SIZES, dtype_of


def disk(
    config: Config,
    corpora: Mapping[str, PlannedCorpus],
    chats: Mapping[str, PlannedChats],
    trainings: Sequence[PlannedTraining],
) -> dict[str, Any]:
    """Bytes by what they are, None where they are not known; `estimated` names those that are estimates.

    While a training saves, it has one checkpoint more than it keeps.

    Args:
        corpora: those that are trained on, as the plan has them.
        chats: the sources of conversations that are trained on.
        trainings: all of the plan; those on request keep nothing until they are asked for.
    """
    vocabulary = config.tokenizer.vocab_size
    trained = [one for one in trainings if not one["on_request"]]
    kept = [one["checkpoint_bytes"] * one["checkpoints_kept"] for one in trained]
    # Trainings read the raw files of the others.
    encoded = [one for one in corpora.values() if not one["registered"]]
    # An id that is compressed takes no more than its information, and the masks beside it hardly anything.
    of_id = math.log2(vocabulary) / 8
    of_chats = _sum(one["estimated_tokens"] for one in chats.values())
    expected = None if of_chats is None else of_chats * of_id
    found = {
        "raw_text": (_sum(one["raw_bytes"] for one in corpora.values()), None),
        "training_tokens": (
            _sum((one["train_tokens"] for one in encoded), SIZES[dtype_of(vocabulary)]),
            _sum((one["estimated_tokens"] for one in encoded), SIZES[dtype_of(vocabulary)]),
        ),
        "raw_conversations": (_sum(one["raw_bytes"] for one in chats.values()), None),
        "rendered_conversations": (_sum(one["rendered_bytes"] for one in chats.values()), expected),
        "packs": (_sum(one["packed_bytes"] for one in chats.values()), expected),
        "checkpoints": (sum(kept), None),
        "checkpoints_while_saving": (
            sum(kept) + max((one["checkpoint_bytes"] for one in trained), default=0),
            None,
        ),
    }
    return {what: estimate if counted is None else counted for what, (counted, estimate) in found.items()} | {
        "estimated": [what for what, (counted, estimate) in found.items() if counted is None and estimate]
    }


def raw_bytes(source: str, path: str, lock: Lock) -> int | None:
    """Bytes of a raw file of a source; None where they are not known yet."""
    if path.startswith("<data>/raw/"):
        file = lock.file(source, path.rpartition("/")[2])
        return file.size if file.sha256 else None  # "": only assumed
    return Path(path).stat().st_size if Path(path).is_file() else None


def made(directory: Path, shards: Iterable[str]) -> int | None:
    """Bytes of what the jobs of all shards have written, by the records in a directory; None before that."""
    try:
        records = [read(directory / f"{shard}.json") for shard in shards]
    except (UserError, OSError):
        return None
    return sum(entry.bytes for record in records for entry in record.outputs)


def _sum(numbers: Iterable[float | None], times: float = 1) -> float | None:
    total = 0.0
    for number in numbers:
        if number is None:
            return None
        total += number * times
    return total
