from __future__ import annotations

from snaketron.data.chats.mixing import interleave, mix

import numpy as np
import pytest


def test_equal_weights_take_turns():
    assert interleave([1, 1], 6).tolist() == [0, 1, 0, 1, 0, 1]


def test_a_weight_of_three_quarters_comes_three_times_in_four():
    assert interleave([0.75, 0.25], 8).tolist() == [0, 0, 0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize("seed", range(20))
def test_every_prefix_is_within_one_sample_of_the_wanted_mix(seed):
    weights = np.random.default_rng(seed).random(1 + seed % 12) ** 3 + 1e-6
    sources = interleave(weights.tolist(), 400)
    had = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)
    wanted = np.arange(1, 401)[:, None] * weights / weights.sum()
    assert np.abs(had - wanted).max() < 1


def test_an_epoch_holds_every_sample_once_and_the_next_is_in_another_order():
    _, samples = mix([10], [1.0], 30, seed=1)
    epochs = samples.reshape(3, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3


def test_a_small_source_repeats_while_a_large_one_does_not():
    sources, samples = mix([4, 100], [0.5, 0.5], 40, seed=1)
    assert np.bincount(samples[sources == 0]).tolist() == [5, 5, 5, 5]
    assert len(set(samples[sources == 1].tolist())) == 20


def test_a_longer_run_begins_like_a_shorter_one():
    sources, samples = mix([7, 5, 3], [0.5, 0.3, 0.2], 1000, seed=3)
    short_sources, short_samples = mix([7, 5, 3], [0.5, 0.3, 0.2], 123, seed=3)
    assert np.array_equal(sources[:123], short_sources) and np.array_equal(samples[:123], short_samples)
    assert sources.dtype == np.int32 and samples.dtype == np.int64


def test_the_seed_changes_the_samples_and_not_the_mix():
    sources, samples = mix([50, 50], [0.6, 0.4], 60, seed=1)
    other_sources, other_samples = mix([50, 50], [0.6, 0.4], 60, seed=2)
    assert np.array_equal(sources, other_sources) and not np.array_equal(samples, other_samples)


def test_sources_of_one_size_are_walked_in_different_orders():
    sources, samples = mix([50, 50], [1, 1], 100, seed=1)
    assert samples[sources == 0].tolist() != samples[sources == 1].tolist()


def test_no_samples_are_no_samples():
    sources, samples = mix([3], [1.0], 0, seed=1)
    assert len(sources) == len(samples) == 0


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ([1, 2], [1.0], "2 sizes and 1 weights"),
        ([], [], "0 sizes"),
        ([0], [1.0], "must be positive"),
        ([1], [0.0], "must be positive"),
        ([1], [float("nan")], "must be positive"),
    ],
)
def test_impossible_mixes_are_refused(sizes, weights, message):
    with pytest.raises(ValueError, match=message):
        mix(sizes, weights, 10, seed=1)
