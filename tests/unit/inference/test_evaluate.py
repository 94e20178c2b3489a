"""What is computed of held-out data: sums by hand on a model that was never trained."""

from __future__ import annotations

import json
import math
from pathlib import Path

import snaketron.model  # noqa: F401  before megatron
from snaketron.data.tokenizer import load_tokenizer
from snaketron.files import write_json
from snaketron.inference import evaluate
from snaketron.inference.generate import generate
from snaketron.model.build import build_model

import numpy as np
import pytest
import torch

EOS = 2


class OneByte:
    """A byte for each token but the end of a document."""

    def of(self, ids: np.ndarray) -> int:
        return int((ids != EOS).sum())


@pytest.fixture
def built(settings):
    return build_model(*settings(), 256)


def nats(built, text: list[int]) -> torch.Tensor:
    with built.evaluating():
        logits = built.model(torch.tensor([text]), torch.arange(len(text))[None], None)[0, :-1, :256]
    return -logits.log_softmax(-1)[torch.arange(len(text) - 1), torch.tensor(text[1:])]


def test_documents_are_scored_once_in_windows_of_the_models_length(monkeypatch: pytest.MonkeyPatch):
    """Two documents of 5 and 4 tokens, windows of 3 tokens, and 8 tokens wanted."""
    documents = [np.array([10, 11, 12, 13, EOS]), np.array([20, 21, 22, EOS])]
    monkeypatch.setattr(evaluate, "IndexedDataset", lambda _: documents)
    found = evaluate.windows([Path("shard")], EOS, 3, 8)
    assert [window.tolist() for window in found] == [
        [EOS, 10, 11, 12],
        [12, 13, EOS],
        [EOS, 20, 21, 22],
    ]


def test_the_loss_of_a_corpus_is_a_mean_over_its_tokens(built, monkeypatch: pytest.MonkeyPatch):
    """Two documents of 3 and 2 tokens and 3 bytes; bits a byte = nats / ln 2 / bytes."""
    documents = [np.array([10, 11, EOS]), np.array([20, EOS])]
    monkeypatch.setattr(evaluate, "IndexedDataset", lambda _: documents)
    found = evaluate.text_losses(built, [Path("shard")], OneByte(), EOS, 100, batch_size=2)
    total = float(nats(built, [EOS, 10, 11, EOS]).sum() + nats(built, [EOS, 20, EOS]).sum())
    assert found["tokens"] == 5
    assert found["loss"] == pytest.approx(total / 5)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / 3)


# (id, whether the assistant said it)
TWO_TURNS = [(10, 0), (11, 1), (12, 1), (13, 0), (14, 0), (15, 1)]
QUESTION = [(5, 0), (6, 0), (7, 1), (8, 1)]


@pytest.fixture
def files(packed_blend) -> list[Path]:
    blend = packed_blend(train={"a": [[QUESTION]]}, test={"a": [[TWO_TURNS, QUESTION], [QUESTION]]})
    (source,) = evaluate.held_out_sources(blend)
    assert source.source == "a"
    return source.files


def test_answers_are_what_the_assistant_said_after_what_was_there(files):
    answers = [list(one.answers()) for one in evaluate.conversations(files)]
    turns = [([10], [11, 12]), ([10, 11, 12, 13, 14], [15])]
    assert answers == [turns, [([5, 6], [7, 8])], [([5, 6], [7, 8])]]


def test_the_loss_of_chats_is_that_of_answers_alone(built, files):
    found = evaluate.chat_losses(built, files, OneByte(), 1, batch_size=2)
    ids = [[token for token, _ in conversation] for conversation in (TWO_TURNS, QUESTION)]
    first, second = nats(built, ids[0]), nats(built, ids[1])
    total = float(first[[0, 1, 4]].sum() + second[[1, 2]].sum())
    assert found["tokens"] == 5
    assert found["loss"] == pytest.approx(total / 5)


def test_packs_without_an_answer_have_no_loss(built, packed_blend):
    """Packs that were registered may have none among the first; those that answer come later."""
    untrained = [(5, 0), (6, 0), (7, 0)]
    blend = packed_blend(train={"a": [[QUESTION]]}, test={"a": [[untrained], [QUESTION]]})
    (source,) = evaluate.held_out_sources(blend)
    nothing = {"tokens": 0, "loss": None, "bits_per_byte": None, "accuracy": None}
    assert evaluate.chat_losses(built, source.files, OneByte(), 1, batch_size=2) == nothing
    assert evaluate.chat_losses(built, source.files, OneByte(), 2, batch_size=2)["tokens"] == 2


def test_answers_that_are_the_same_to_the_letter_are_counted(built, tokenizer_dir, packed_blend):
    """One conversation has the answer that the model gives, and the other one does not."""
    (said,) = generate(built, [[5, 6]], stop=[], max_tokens=2)
    right = [(5, 0), (6, 0), *((token, 1) for token in said)]
    wrong = [(5, 0), (6, 0), (said[0], 1), ((said[1] + 1) % 200, 1)]
    blend = packed_blend(train={"a": [[QUESTION]]}, test={"a": [[right], [wrong]]})
    (source,) = evaluate.held_out_sources(blend)
    found = evaluate.exact_answers(built, source.files, load_tokenizer(tokenizer_dir), 9, 2, batch_size=2)
    assert found == {"texts": {"asked": 2, "exact": 1, "cut": 0, "share": 0.5}}
    # A single token is the end of neither reference.
    found = evaluate.exact_answers(built, source.files, load_tokenizer(tokenizer_dir), 9, 1, batch_size=2)
    assert found == {"texts": {"asked": 2, "exact": 0, "cut": 2, "share": 0.0}}


def test_corpora_of_several_phases_are_read_once(tmp_path: Path):
    """Both phases have docs; the second has an empty shard of code."""
    shards = [{"prefix": "docs/0", "corpus": "docs", "tokens": 9}]
    write_json(tmp_path / "a.json", {"test": {"shards": shards}})
    empty = {"prefix": "code/0", "corpus": "code", "tokens": 0}
    write_json(tmp_path / "b.json", {"test": {"shards": [*shards, empty]}})
    write_json(tmp_path / "c.json", {"test": None})
    found = evaluate.corpora([tmp_path / name for name in ("a.json", "b.json", "c.json")])
    assert found == {"docs": [Path("docs/0")]}


def test_bytes_are_those_of_the_text(tokenizer_dir: Path):
    tokenizer = load_tokenizer(tokenizer_dir)
    ids = np.array(tokenizer.encode("the quick \u00e9").ids)
    eos = tokenizer.token_to_id("<|endoftext|>")
    assert eos is not None
    assert evaluate.Sizes(tokenizer, eos).of(np.append(ids, eos)) == len("the quick \u00e9".encode())
    assert json.loads(tokenizer.to_str())["normalizer"] is None
