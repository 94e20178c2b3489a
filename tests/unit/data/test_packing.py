from __future__ import annotations

import random

from snaketron.data.packing import ALGORITHMS, pack

import pytest


def plain_first_fit_decreasing(lengths: list[int], pack_size: int) -> list[list[int]]:
    """The textbook's scan over every open bin."""
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for items in bins:
            if sum(lengths[i] for i in items) + lengths[item] <= pack_size:
                items.append(item)
                break
        else:
            bins.append([item])
    return bins


def test_first_fit_decreasing_fills_gaps():
    # by length: 7 | 6 | 4 joins 6 | 3 joins 7
    assert pack([4, 7, 3, 6], 10, "first_fit_decreasing") == [[1, 2], [3, 0]]


def test_concatenative_keeps_the_order():
    # 4 | 7 does not fit beside 4, and 3 does beside 7 | 6 does not
    assert pack([4, 7, 3, 6], 10, "concatenative") == [[0], [1, 2], [3]]


def test_equal_lengths_keep_their_order():
    assert pack([5, 5, 5], 10, "first_fit_decreasing") == [[0, 1], [2]]


def test_the_tree_finds_the_same_bins_as_a_plain_scan():
    draw = random.Random(0)
    for _ in range(300):
        pack_size = draw.randrange(1, 20)
        lengths = [draw.randrange(1, pack_size + 1) for _ in range(draw.randrange(40))]
        assert pack(lengths, pack_size, "first_fit_decreasing") == plain_first_fit_decreasing(
            lengths, pack_size
        )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_item_is_in_one_bin_and_no_bin_overflows(algorithm):
    draw = random.Random(1)
    lengths = [min(512, int(draw.lognormvariate(4, 1)) + 1) for _ in range(2000)]
    bins = pack(lengths, 512, algorithm)
    assert sorted(item for items in bins for item in items) == list(range(2000))
    assert all(sum(lengths[item] for item in items) <= 512 for items in bins)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nothing_packs_into_nothing_and_one_into_one(algorithm):
    assert pack([], 10, algorithm) == []
    assert pack([10], 10, algorithm) == [[0]]


@pytest.mark.parametrize("length", [0, 11])
def test_lengths_that_no_bin_holds_are_refused(length):
    with pytest.raises(ValueError, match="between 1 and the pack size 10"):
        pack([length], 10, "concatenative")


def test_an_unknown_algorithm_is_refused():
    with pytest.raises(ValueError, match="'best' is none of first_fit_decreasing, concatenative"):
        pack([1], 10, "best")
