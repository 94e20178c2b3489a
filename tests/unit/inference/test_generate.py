"""The most likely continuation, of a model that was never trained and has no optimizer."""

from __future__ import annotations

import snaketron.model  # noqa: F401  before megatron
from snaketron.inference.generate import generate
from snaketron.model.build import build_model

import pytest
import torch


@pytest.fixture
def built(settings):
    return build_model(*settings(), 256)


def by_hand(built, ids: list[int], steps: int) -> list[int]:
    """The argmax of the logits after the whole text, again and again."""
    text = list(ids)
    for _ in range(steps):
        with torch.no_grad():
            logits = built.model(torch.tensor([text]), torch.arange(len(text))[None], None)
        text.append(int(logits[0, -1, :256].argmax()))
    return text[len(ids) :]


def test_each_token_is_the_most_likely_after_all_before_it(built):
    built.model.eval()
    assert generate(built, [5, 6, 7], stop=-1, max_tokens=4) == by_hand(built, [5, 6, 7], 4)


def test_it_ends_with_the_token_that_ends_an_answer(built):
    whole = generate(built, [5, 6, 7], stop=-1, max_tokens=4)
    last = next(i for i, token in enumerate(whole) if token == whole[1])  # where it comes first
    assert generate(built, [5, 6, 7], stop=whole[1], max_tokens=4) == whole[: last + 1]


def test_it_ends_with_the_longest_sequence_of_the_model(built):
    """16 tokens, of which the prompt has 14."""
    assert len(generate(built, list(range(3, 17)), stop=-1, max_tokens=9)) == 2


def test_multi_token_prediction_is_back_afterwards(built):
    assert built.model.mtp_process
    generate(built, [5], stop=-1, max_tokens=1)
    assert built.model.mtp_process
