"""Losses of given texts, against the whole forward pass of each text by itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import snaketron.model  # noqa: F401  before megatron
from snaketron.inference import score as scoring
from snaketron.inference.score import score
from snaketron.model.build import build_model

import numpy as np
import pytest
import torch


def test_scores_are_those_of_each_text_by_itself(settings, monkeypatch: pytest.MonkeyPatch):
    """Texts of 2 to 15 tokens, two at a time, read in pieces of 4 tokens."""
    monkeypatch.setattr(scoring, "CHUNK", 4)
    built = build_model(*settings(), 256)
    texts = [list(range(first, first + length)) for first, length in ((3, 2), (50, 15), (9, 7), (90, 6))]
    for text, (nats, likeliest) in zip(texts, score(built, texts, batch_size=2), strict=True):
        with built.evaluating():
            logits = built.model(torch.tensor([text]), torch.arange(len(text))[None], None)[0, :-1, :256]
        targets = torch.tensor(text[1:])
        expected = -logits.log_softmax(-1)[torch.arange(len(targets)), targets]
        np.testing.assert_allclose(nats, expected, rtol=1e-5)
        assert likeliest.tolist() == (logits.argmax(-1) == targets).tolist()


def test_no_texts_have_no_scores(settings):
    assert score(build_model(*settings(), 256), []) == []


def test_scores_over_a_large_vocabulary_are_those_of_float64():
    """A sum of 131,072 numbers one after the other in float32 was 2e-4 nats too small for each token."""
    logits = 3 * torch.randn(2, 20, 131_072, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(40).view(2, 20)
    decoder: Any = SimpleNamespace(read_all=lambda _: logits)
    nats, _ = scoring._scores(decoder, torch.zeros(2, 20, dtype=torch.int64), targets)
    expected = -logits.double().log_softmax(-1).gather(2, targets[..., None])[..., 0]
    np.testing.assert_allclose(nats, expected, atol=3e-5)
