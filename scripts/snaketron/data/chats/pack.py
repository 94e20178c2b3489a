"""Rendered chats into packs: planned from the lengths of all conversations, then written in passes.

A pack may hold conversations of any of the files. The tokens do not have to fit in memory: each pass over
the files collects as many packs as fit.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from snaketron.config.data import SPLITS
from snaketron.data.arrow import check_expected, flatten, read_footer, row_groups, view
from snaketron.data.chats import packing, packs
from snaketron.data.chats.left_out import LeftOut
from snaketron.data.chats.sequences import SCHEMA
from snaketron.lineage.record import Record, making
from snaketron.log import UserError, logger
from snaketron.settings.chats import PackSettings

import numpy as np
import pyarrow as pa

TOO_LONG = "longer than a pack"
PASS_TOKENS = 1 << 28  # tokens in memory, at 5 bytes each


def pack_chats(
    chats: Sequence[Path],
    *,
    settings: PackSettings,
    max_dropped_fraction: float,
    outputs: Mapping[str, Path],
    record: Path,
) -> Record:
    """Pack the rendered `chats` of a source, each split into its file of `outputs`; then write `record`.

    Raises `UserError` when more than `max_dropped_fraction` of the conversations would be left out.
    """
    source = f"{read_footer(chats[0], SCHEMA.names)[1]['source']}/{record.stem}"
    with making("pack_sft", source, outputs=outputs, record=record) as job:
        found = Conversations.read(chats, settings)
        plans = {split: plan(found, split, settings) for split in outputs}
        job.settings = found.metadata | settings.model_dump()
        needed = smallest_packs(found.lengths + found.cut)
        left_out = LeftOut()
        left_out.add((made.counts for made in plans.values()), needed)
        check_dropped(left_out, source, settings.pack_size, max_dropped_fraction)
        write(found, plans, job.aside, job.settings)
        job.inputs = {"chats": chats}
        job.counts = {
            "splits": {split: made.counts for split, made in plans.items()},
            "needed_pack_size": needed,
        }
    return job.record


class _RowGroup(NamedTuple):
    """A row group of a file, and the numbers of its conversations."""

    path: Path
    number: int
    start: int
    end: int


@dataclass(frozen=True)
class Conversations:
    """All conversations of some files, numbered through, without their tokens (about 20 bytes each).

    A conversation of more tokens than a pack may be cut.
    """

    groups: list[_RowGroup]
    lengths: np.ndarray  # after cutting
    answered: np.ndarray  # so many tokens at the beginning keep their mask; the rest is not trained
    trained: np.ndarray  # trained tokens of each; its first never is, as nothing predicts it
    cut: np.ndarray  # tokens that were cut off
    splits: np.ndarray  # indices of SPLITS
    metadata: dict[str, Any]  # what the files were made with

    @classmethod
    def read(cls, files: Sequence[Path], settings: PackSettings) -> Conversations:
        """Read all but the tokens.

        Raises `UserError` for a file that is given twice, is damaged, or was made unlike the first.
        """
        pack_size, long_conversations = settings.pack_size, settings.long_conversations
        metadata: dict[str, Any] = {}
        groups: list[_RowGroup] = []
        numbers = np.empty(0, np.int32)
        parts = [(numbers, numbers, numbers, numbers, np.empty(0, np.int8))]
        count = 0
        for path, times in Counter(files).items():
            if times > 1:
                raise UserError(f"{path}: is given twice; its conversations would be packed twice")
            _, made_with = read_footer(path, SCHEMA.names)
            metadata = metadata or made_with
            check_expected(path, made_with, metadata)
            for number, table in enumerate(row_groups(path, ["loss_mask", "split"])):
                mask, offsets = flatten(table.column("loss_mask"))
                before = np.concatenate([np.zeros(1, np.int64), np.cumsum(mask, dtype=np.int64)])
                starts, ends = offsets[:-1], offsets[1:]
                lengths = ends - starts
                kept, answered = lengths.copy(), lengths.copy()
                if long_conversations != "drop":
                    for i in np.flatnonzero(lengths > pack_size).tolist():
                        answered[i] = last_answer(mask[starts[i] : ends[i]], pack_size)
                        kept[i] = answered[i] if long_conversations == "cut_at_answer" else pack_size
                trained = before[starts + answered] - before[np.minimum(starts + 1, starts + answered)]
                columns = (kept, answered, trained, lengths - kept)
                parts.append((*(column.astype(np.int32) for column in columns), _splits(table)))
                groups.append(_RowGroup(path, number, count, count + len(starts)))
                count += len(starts)
        lengths, answered, trained, cut, splits = (np.concatenate(part) for part in zip(*parts, strict=True))
        return cls(groups, lengths, answered, trained, cut, splits, metadata)

    def tokens(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids (int32) and masks (uint8) of the `wanted` conversations, one after the other.

        The masks are aligned with the labels. Every row group that holds one of the
        conversations is read once, in the order of the files.
        """
        ends = np.cumsum(self.lengths[wanted], dtype=np.int64)
        place = np.full(len(self.lengths), -1, dtype=np.int64)
        place[wanted] = ends - self.lengths[wanted]
        input_ids = np.empty(ends[-1], dtype=np.int32)
        loss_mask = np.zeros(ends[-1], dtype=np.uint8)
        for path, groups in itertools.groupby(self.groups, key=lambda group: group.path):
            needed = [group for group in groups if (place[group.start : group.end] >= 0).any()]
            tables = row_groups(path, ["input_ids", "loss_mask"], [group.number for group in needed])
            for group, table in zip(needed, tables, strict=True):
                ids, offsets = flatten(table.column("input_ids"))
                trained, _ = flatten(table.column("loss_mask"))
                there = place[group.start : group.end]
                for item in np.flatnonzero(there >= 0).tolist():
                    to, start = there[item], offsets[item]
                    length, answered = self.lengths[group.start + item], self.answered[group.start + item]
                    input_ids[to : to + length] = ids[start : start + length]
                    loss_mask[to : to + max(answered, 1) - 1] = trained[start + 1 : start + max(answered, 1)]
        return input_ids, loss_mask


def last_answer(loss_mask: np.ndarray, room: int) -> int:
    """The end of the last answer that fits in `room` tokens; 0 if none does.

    An answer is a run of trained tokens.
    """
    ends = np.flatnonzero(np.diff(loss_mask[: room + 1].astype(np.int8)) == -1) + 1
    return int(ends[-1]) if len(ends) else 0


def _splits(table: pa.Table) -> np.ndarray:
    """The splits of conversations, as indices of SPLITS."""
    parts = [np.empty(0, np.int8)]
    for chunk in table.column("split").chunks:
        names = np.array([SPLITS.index(name) for name in chunk.dictionary.to_pylist()], dtype=np.int8)
        parts.append(names[view(chunk.indices)])
    return np.concatenate(parts)


# ----------------------------------------------------------------------------------------------- planning


class Plan(NamedTuple):
    """The packs of a split: pack i holds the conversations indices[offsets[i] : offsets[i + 1]]."""

    offsets: np.ndarray
    indices: np.ndarray
    counts: dict[str, Any]


def plan(chats: Conversations, split: str, settings: PackSettings) -> Plan:
    """Decide which conversations share a pack; those that cannot be used are dropped and counted.

    In a pack, a conversation takes up its length rounded up to the `padding_multiple`, which divides the pack
    size.
    """
    pack_size, multiple = settings.pack_size, settings.padding_multiple
    in_split = chats.splits == SPLITS.index(split)
    dropped = {reason: in_split & which for reason, which in not_packed(chats, pack_size).items()}
    chosen = np.flatnonzero(in_split & ~np.logical_or.reduce([*dropped.values()]))
    lengths = chats.lengths[chosen]
    bins = packing.pack(-(-lengths // multiple) * multiple, pack_size, settings.algorithm, settings.seed)
    cut = chosen[chats.cut[chosen] > 0]
    tokens = int(lengths.sum(dtype=np.int64))
    counts = {
        "conversations": int(in_split.sum()),
        "packed": len(chosen),
        "dropped": {reason: int(which.sum()) for reason, which in dropped.items() if which.any()},
        "cut": len(cut),
        "cut_tokens": int(chats.cut[cut].sum(dtype=np.int64)),
        "packs": len(bins),
        "tokens": tokens,
        "trained_tokens": int(chats.trained[chosen].sum(dtype=np.int64)),
        "efficiency": round(tokens / (len(bins) * pack_size), 4) if len(bins) else 0.0,
        "length_histogram": length_histogram(lengths),
    }
    return Plan(bins.offsets, chosen[bins.indices], counts)


def not_packed(chats: Conversations, pack_size: int) -> dict[str, np.ndarray]:
    """The conversations that no pack takes: a mask for each reason."""
    too_long = chats.lengths > pack_size
    untrained, cut = ~too_long & (chats.trained == 0), chats.cut > 0
    return {
        TOO_LONG: too_long,
        "longer than a pack, which no answer fits in": untrained & cut,
        "nothing to train on": untrained & ~cut,
    }


def length_histogram(lengths: np.ndarray) -> dict[str, int]:
    """How many lengths lie in [2^k, 2^(k + 1)), by 2^k; powers without any are left out."""
    powers = np.bincount(np.frexp(lengths)[1] - 1)
    return {str(2**k): int(number) for k, number in enumerate(powers) if number}


def smallest_packs(lengths: np.ndarray) -> dict[str, int]:
    """How many conversations need packs of 2^k tokens, by 2^k, the smallest that holds them whole.

    >>> smallest_packs(np.array([3, 4, 5, 1024]))
    {'4': 2, '8': 1, '1024': 1}
    """
    powers = np.bincount(np.frexp(lengths - 1)[1])
    return {str(2**k): int(number) for k, number in enumerate(powers) if number}


def check_dropped(left_out: LeftOut, source: str, pack_size: int, max_dropped_fraction: float) -> None:
    """Say what no pack takes; `UserError` where that is more than allowed."""
    said = left_out.told(source, pack_size)
    if left_out.reasons.total() > max_dropped_fraction * left_out.conversations:
        raise UserError(
            f"{said}. That is more than sft_data.max_dropped_fraction {max_dropped_fraction:g} allows: raise "
            "sft_data.pack_size, let sft_data.long_conversations cut them, or allow more"
        )
    if said:
        logger.info("%s", said)


# ------------------------------------------------------------------------------------------------ writing


def write(
    chats: Conversations, plans: Mapping[str, Plan], paths: Mapping[str, Path], metadata: Mapping[str, Any]
) -> None:
    """Write the packs of each split to its path, with what they were made with in the footer."""
    planned = read_packs(chats, list(plans.values()))
    for split, made in plans.items():
        footer = {**metadata, "split": split, "counts": made.counts}
        packs.write(paths[split], itertools.islice(planned, made.counts["packs"]), footer)


def read_packs(chats: Conversations, plans: Sequence[Plan]) -> Iterator[packs.Pack]:
    """The packs of all plans, one after the other.

    A pass over the files collects packs of up to `PASS_TOKENS` tokens together, and at least one pack.
    """
    indices = np.concatenate([made.indices for made in plans])
    sizes = np.concatenate([np.diff(made.offsets) for made in plans])
    # Pack i has the conversations from bounds[i] to bounds[i + 1].
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(chats.lengths[indices], dtype=np.int64)])
    begins = starts[bounds]  # the first token of each pack
    first = 0
    while first < len(sizes):
        fit = int(np.searchsorted(begins, begins[first] + PASS_TOKENS, side="right")) - 1
        last = max(first + 1, fit)
        input_ids, loss_mask = chats.tokens(indices[bounds[first] : bounds[last]])
        for pack in range(first, last):
            inner = starts[bounds[pack] : bounds[pack + 1]] - begins[pack]
            here = slice(begins[pack] - begins[first], begins[pack + 1] - begins[first])
            # Copies: else the packs that wait for their row group would keep the arrays of two passes.
            yield packs.Pack(input_ids[here].copy(), loss_mask[here].copy(), inner.astype(np.int32))
        first = last
        del input_ids, loss_mask
