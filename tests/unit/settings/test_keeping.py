"""The checkpoints of a training that are kept."""

from __future__ import annotations

from snaketron.config import load
from snaketron.settings.keeping import kept, kept_at_end
from snaketron.settings.training import run_settings

import pytest


@pytest.mark.parametrize(
    ("keys", "left"),
    [
        # Kept of the checkpoints after every 10 steps, and after 45, where the rate begins to fall:
        ({}, {45, 70, 80}),
        ({"keep_steady": 3}, {30, 40, 45, 70, 80}),
        ({"keep_steady": 3, "steady_interval": 20}, {20, 40, 45, 70, 80}),
        ({"keep_steady": 0}, {70, 80}),
        ({"keep_checkpoints": 1}, {45, 80}),
    ],
)
def test_the_newest_checkpoints_and_those_before_the_decay_are_kept(keys: dict[str, int], left: set[int]):
    run = run_settings(load({"pretrain": {"save_interval": 10} | keys}, {}), "pretrain/broad")
    there = [10, 20, 30, 40, 45, 50, 60, 70, 80]
    assert kept(there, run, steady=45) == left
    # Saved with a shorter interval, there are others before the decay, of which as many are kept.
    assert len(kept_at_end(run, steady=45, steps=80)) == len(left)


def test_the_checkpoints_of_trillions_of_steps_are_counted_in_no_time():
    """A large phase on the batches of the sample: the newest 2, and 3 from before the rate falls."""
    run = run_settings(load({"pretrain": {"save_interval": 10, "keep_steady": 3}}, {}), "pretrain/broad")
    assert len(kept_at_end(run, steady=4 * 10**12, steps=5 * 10**12)) == 5


def test_without_steady_checkpoints_none_is_counted_that_the_newest_would_keep():
    """Three steps at one rate: one checkpoint, at the end. A dry-run counted one after two steps, too."""
    keys = {"save_interval": 5, "steady_interval": 2, "keep_steady": 0, "keep_checkpoints": 3}
    run = run_settings(load({"pretrain": keys}, {}), "pretrain/broad")
    assert kept_at_end(run, steady=3, steps=3) == {3}
    assert kept_at_end(run, steady=3, steps=12) == {5, 10, 12}
