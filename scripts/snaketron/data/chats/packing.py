"""Which conversations share a pack: from lengths to bins, without touching a token."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from snaketron.config.data import Packing

import numpy as np

# One walk through the tree, and the steps of one run, take as long as comparing so many bins of an array.
_WALK, _RUN = 2500, 30_000


class Bins(NamedTuple):
    """The items of all bins, one bin after the other: bin i holds indices[offsets[i] : offsets[i + 1]]."""

    offsets: np.ndarray
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lists(self) -> list[list[int]]:
        """The items of each bin."""
        return [part.tolist() for part in np.split(self.indices, self.offsets[1:-1])] if len(self) else []


def pack(
    lengths: np.ndarray | Sequence[int], pack_size: int, algorithm: Packing, seed: int | None = None
) -> Bins:
    """Put each item, by its index, into a bin of at most `pack_size`; none is split and none left out.

    `seed` draws the order of first_fit_shuffle; the other algorithms take none.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(lengths) and not 0 < lengths.min() <= lengths.max() <= pack_size:
        raise ValueError(f"lengths must lie between 1 and the pack size {pack_size}")
    if algorithm == "concatenative":
        return concatenative(lengths, pack_size)
    if algorithm == "first_fit_decreasing":
        return first_fit_decreasing(lengths, pack_size)
    if seed is None:
        raise ValueError("first_fit_shuffle needs a seed")
    order = np.random.default_rng(seed).permutation(len(lengths))
    return _gather(order, first_fit(lengths[order], pack_size))


def concatenative(lengths: np.ndarray, pack_size: int) -> Bins:
    """In the given order; an item that does not fit closes the bin and opens the next."""
    ends = np.cumsum(lengths)
    following = np.searchsorted(ends, ends - lengths + pack_size, side="right").tolist()
    offsets = [0]
    while offsets[-1] < len(lengths):
        offsets.append(following[offsets[-1]])  # the first item that does not fit beside this one
    return Bins(np.array(offsets, dtype=np.int64), np.arange(len(lengths)))


def first_fit_decreasing(lengths: np.ndarray, pack_size: int) -> Bins:
    """The longest item first, each into the first bin with room for it: at most 11/9 of the fewest bins."""
    order = np.argsort(-lengths, kind="stable")
    decreasing = lengths[order]
    num_runs = np.count_nonzero(np.diff(decreasing)) + 1
    if num_runs * (_RUN + _most_bins(decreasing, pack_size)) <= _WALK * len(decreasing):
        return _gather(order, _first_fit_by_runs(decreasing, pack_size))
    return _gather(order, first_fit(decreasing, pack_size))


def first_fit(lengths: np.ndarray, pack_size: int) -> np.ndarray:
    """The bin of each item, when each in turn goes into the first bin with room for it.

    A tree over the bins holds the most room below each node, so finding the first bin with room takes
    log n steps and not one for every open bin.
    """
    num_leaves = 1 << (_most_bins(lengths, pack_size) - 1).bit_length()
    room = [pack_size] * (2 * num_leaves)  # room[1] is the root; the leaves are bins, empty until opened
    leaves = []
    for length in _numbers(lengths):
        node = 1
        while node < num_leaves:
            node += node
            if room[node] < length:
                node += 1
        leaves.append(node)
        room[node] = most = room[node] - length
        while node > 1:
            beside = room[node ^ 1]
            if beside > most:
                most = beside
            node >>= 1
            if room[node] == most:
                break
            room[node] = most
    return np.array(leaves, dtype=np.int64) - num_leaves


def _first_fit_by_runs(decreasing: np.ndarray, pack_size: int) -> np.ndarray:
    """Like `first_fit`, for lengths in decreasing order, where equal ones follow each other.

    A run of equal items fills the bins with room in their order, each with as many as fit, and then new bins.
    That takes a few array operations for a run, and none for an item.
    """
    bins = np.empty(len(decreasing), dtype=np.int64)
    room = np.full(_most_bins(decreasing, pack_size), pack_size, dtype=np.int32)
    opened = 0
    bounds = np.flatnonzero(np.diff(decreasing, prepend=0, append=0)).tolist()
    for start, end in itertools.pairwise(bounds):
        length, count = int(decreasing[start]), end - start
        # Take all bins that `count` more can need for open ones: the last ones are empty, and used last.
        opened_after = opened + -(-count // (pack_size // length))
        with_room = np.flatnonzero(room[:opened_after] >= length)[:count]
        filled = np.cumsum(room[with_room] // length)
        last = int(np.searchsorted(filled, count))
        with_room, filled = with_room[: last + 1], filled[: last + 1]
        filled[last] = count
        taken = np.diff(filled, prepend=0)
        bins[start:end] = np.repeat(with_room, taken)
        room[with_room] -= (taken * length).astype(np.int32)
        opened = max(opened, int(with_room[-1]) + 1)
    return bins


def _most_bins(lengths: np.ndarray, pack_size: int) -> int:
    """The most bins that a first fit opens: all of its bins but one are more than half full."""
    return min(len(lengths), 2 * int(lengths.sum()) // pack_size + 1) + 1


def _gather(order: np.ndarray, bins: np.ndarray) -> Bins:
    """The items by bin: item order[i] lies in bin bins[i]. Within a bin, items keep their order."""
    sizes = np.bincount(bins) if len(bins) else np.empty(0, dtype=np.int64)
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
    return Bins(offsets, order[np.argsort(bins, kind="stable")])


def _numbers(values: np.ndarray) -> Iterable[int]:
    """The values of an array as Python numbers, without a list of all of them."""
    at_once = 1 << 16
    for start in range(0, len(values), at_once):
        yield from values[start : start + at_once].tolist()
