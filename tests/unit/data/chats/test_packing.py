from __future__ import annotations

import random
from collections.abc import Iterable
from typing import get_args

from snaketron.config.data import Packing
from snaketron.data.chats import packing
from snaketron.data.chats.packing import pack

import numpy as np
import pytest


def plain_first_fit(lengths: list[int], pack_size: int, order: Iterable[int]) -> list[list[int]]:
    """The textbook's scan over every open bin."""
    bins: list[list[int]] = []
    for item in order:
        for items in bins:
            if sum(lengths[i] for i in items) + lengths[item] <= pack_size:
                items.append(item)
                break
        else:
            bins.append([item])
    return bins


def longest_first(lengths: list[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def random_cases(count: int) -> Iterable[tuple[list[int], int]]:
    draw = random.Random(0)
    for _ in range(count):
        pack_size = draw.randrange(1, draw.choice((4, 20, 200)))
        longest = draw.randrange(1, pack_size + 1)
        yield [draw.randrange(1, longest + 1) for _ in range(draw.randrange(60))], pack_size


def chat_lengths(count: int, longest: int) -> np.ndarray:
    lengths = np.random.default_rng(1).lognormal(4, 1, count).astype(np.int64) + 1
    return np.minimum(lengths, longest)


def test_first_fit_decreasing_fills_gaps():
    # by length: 7 | 6 | 4 joins 6 | 3 joins 7
    assert pack([4, 7, 3, 6], 10, "first_fit_decreasing").lists() == [[1, 2], [3, 0]]


def test_concatenative_keeps_the_order():
    # 4 | 7 does not fit beside 4, and 3 does beside 7 | 6 does not
    assert pack([4, 7, 3, 6], 10, "concatenative").lists() == [[0], [1, 2], [3]]


def test_first_fit_takes_the_first_bin_with_room():
    # 4 | 7 opens a bin | 3 joins 4 | 6 opens a bin | 3 joins 4 and 3
    assert packing.first_fit(np.array([4, 7, 3, 6, 3]), 10).tolist() == [0, 1, 0, 2, 0]


def test_equal_lengths_keep_their_order():
    assert pack([5, 5, 5], 10, "first_fit_decreasing").lists() == [[0, 1], [2]]


def test_a_run_of_equal_lengths_fills_old_bins_before_new_ones():
    # 6 | 5 | of three 2s, two join 6 and one joins 5 | of seven 1s, three join 5 and four open a bin
    bins = pack([6, 5, 2, 2, 2, *[1] * 7], 10, "first_fit_decreasing")
    assert bins.lists() == [[0, 2, 3], [1, 4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize("walk", [0, 10**9], ids=["tree", "runs"])
def test_first_fit_decreasing_is_that_of_a_plain_scan(walk, monkeypatch):
    monkeypatch.setattr(packing, "_WALK", walk)
    for lengths, pack_size in random_cases(500):
        expected = plain_first_fit(lengths, pack_size, longest_first(lengths))
        assert pack(lengths, pack_size, "first_fit_decreasing").lists() == expected


def test_first_fit_shuffle_is_a_plain_scan_in_a_shuffled_order():
    for lengths, pack_size in random_cases(300):
        order = np.random.default_rng(7).permutation(len(lengths)).tolist()
        expected = plain_first_fit(lengths, pack_size, order)
        assert pack(lengths, pack_size, "first_fit_shuffle", seed=7).lists() == expected


def test_the_seed_decides_the_shuffle():
    lengths = chat_lengths(200, 512)
    first, again, other = (pack(lengths, 512, "first_fit_shuffle", seed=s).lists() for s in (1, 1, 2))
    assert first == again != other


def test_the_shuffle_needs_a_seed():
    with pytest.raises(ValueError, match="first_fit_shuffle needs a seed"):
        pack([1], 10, "first_fit_shuffle")


@pytest.mark.parametrize("pack_size", [512, 262_144])
@pytest.mark.parametrize("algorithm", get_args(Packing))
def test_every_item_is_in_one_bin_and_no_bin_overflows(algorithm, pack_size):
    lengths = chat_lengths(5000, pack_size)
    bins = pack(lengths, pack_size, algorithm, seed=0)
    assert sorted(bins.indices.tolist()) == list(range(5000))
    assert bins.offsets[0] == 0 and bins.offsets[-1] == 5000 and (np.diff(bins.offsets) > 0).all()
    assert np.add.reduceat(lengths[bins.indices], bins.offsets[:-1]).max() <= pack_size


def test_a_long_mix_fills_its_packs():
    lengths = chat_lengths(20_000, 1024)
    tokens = int(lengths.sum())
    assert tokens / (1024 * len(pack(lengths, 1024, "first_fit_decreasing"))) > 0.995
    assert tokens / (1024 * len(pack(lengths, 1024, "first_fit_shuffle", seed=0))) > 0.98


@pytest.mark.parametrize("algorithm", get_args(Packing))
def test_nothing_packs_into_nothing_and_one_into_one(algorithm):
    assert pack([], 10, algorithm, seed=0).lists() == []
    assert pack([10], 10, algorithm, seed=0).lists() == [[0]]
    assert pack([1, 1, 1], 1, algorithm, seed=0).indices.size == 3


@pytest.mark.parametrize("length", [0, 11])
def test_lengths_that_no_bin_holds_are_refused(length):
    with pytest.raises(ValueError, match="between 1 and the pack size 10"):
        pack([length], 10, "concatenative")
