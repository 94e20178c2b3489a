"""What a training will do, in words: 100 steps of 1,000 tokens."""

from __future__ import annotations

from snaketron.sizes.outlook import Planned, Progress, outlook, planned

import pytest


@pytest.mark.parametrize(
    ("progress", "stated", "expected"),
    [
        (Progress("sft-a"), None, "trains 100 steps, 100.0 k tokens"),
        (Progress("sft-a"), 50.0, "trains 100 steps, 100.0 k tokens, about 33.3 min"),
        (
            Progress("sft-a", done=40, tokens_per_second=100.0),
            None,
            "continues after step 40 of 100, about 10.0 min at the speed of the last time",
        ),
        (Progress("sft-a", done=100, finished=True), 50.0, "was trained before and is only published"),
        (
            Progress(tokens_per_second=100.0),
            None,
            "trains 100 steps, 100.0 k tokens, about 16.7 min at the speed of the last time, "
            "once what it is made from is there",
        ),
        (
            Progress(published=True),
            None,
            "trains 100 steps, 100.0 k tokens, once what it is made from is there; starts over unless "
            "that is as before",
        ),
        (
            Progress(published=True, starts_over="other than before: seed"),
            None,
            "trains 100 steps, 100.0 k tokens, once what it is made from is there; starts over: other than "
            "before: seed",
        ),
    ],
)
def test_the_outlook(progress: Progress, stated: float | None, expected: str):
    assert outlook(progress, 100, 1000, stated) == expected


@pytest.mark.parametrize(
    ("progress", "stated", "numbers"),
    [
        (Progress(), None, Planned(100, 0, 100_000, None)),
        (Progress(tokens_per_second=100.0), None, Planned(100, 0, 100_000, 1000.0)),
        (Progress(done=40, tokens_per_second=100.0), 50.0, Planned(100, 40, 60_000, 1200.0)),
        (Progress(finished=True), 50.0, Planned()),
    ],
)
def test_the_outlook_in_numbers(progress: Progress, stated: float | None, numbers: Planned):
    assert planned(progress, 100, 1000, stated) == numbers
