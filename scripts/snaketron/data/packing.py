"""Which conversations share a pack: from lengths to bins, without touching a token."""

from __future__ import annotations

from collections.abc import Sequence

ALGORITHMS = ("first_fit_decreasing", "concatenative")


def pack(lengths: Sequence[int], pack_size: int, algorithm: str) -> list[list[int]]:
    """Put each item, by its index, into a bin of at most `pack_size`; none is split and none left out."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm {algorithm!r} is none of {', '.join(ALGORITHMS)}")
    if any(not 0 < length <= pack_size for length in lengths):
        raise ValueError(f"lengths must lie between 1 and the pack size {pack_size}")
    if algorithm == "concatenative":
        return concatenative(lengths, pack_size)
    return first_fit_decreasing(lengths, pack_size)


def first_fit_decreasing(lengths: Sequence[int], pack_size: int) -> list[list[int]]:
    """The longest item first, each into the first bin with room for it: at most 11/9 of the fewest bins.

    A tree over the bins holds the most room below each node, so finding the first bin with room takes
    log n steps and not one for every open bin.
    """
    num_leaves = 1 << max(0, len(lengths) - 1).bit_length()
    room = [pack_size] * (2 * num_leaves)  # room[1] is the root; the leaves are bins, empty until opened
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length, node = lengths[item], 1
        while node < num_leaves:
            node *= 2
            if room[node] < length:
                node += 1
        index = node - num_leaves
        if index == len(bins):
            bins.append([])
        bins[index].append(item)
        room[node] -= length
        while node > 1:
            node //= 2
            left, right = room[2 * node], room[2 * node + 1]
            most = left if left > right else right
            if room[node] == most:
                break
            room[node] = most
    return bins


def concatenative(lengths: Sequence[int], pack_size: int) -> list[list[int]]:
    """In the given order; an item that does not fit closes the bin and opens the next."""
    bins: list[list[int]] = []
    room = 0
    for item, length in enumerate(lengths):
        if length > room:
            bins.append([])
            room = pack_size
        bins[-1].append(item)
        room -= length
    return bins
