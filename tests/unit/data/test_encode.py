"""The ids are those of `tokenizers`, whichever encoder gives them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from snaketron import files
from snaketron.data import encode
from snaketron.data.tokenizer import load_tokenizer, read_tokenizer, tokenizer_info
from snaketron.log import UserError
from tests.unit.data.text.reading_back import sequences

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

HARD = [
    *encode.PROBES,
    "",
    "<|im_end|>",
    "a <|im_end|><|endoftext|> b",
    "\0",
    "\ud7ff\ue000",
    "x" * 3000,
    " " * 3000,
]


def exact(directory: Path, texts: list[str]) -> list[list[int]]:
    tokenizer = load_tokenizer(directory)
    tokenizer.encode_special_tokens = True
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


def encoded(encoder: encode.Encoder, texts: list[str]) -> list[list[int]]:
    ids, starts = encoder.encode(texts)
    return [ids[start:end].tolist() for start, end in pairwise(starts)]


@pytest.mark.parametrize(("name", "problem"), [("fastokens", None), ("tokenizers", "differs")])
def test_both_encoders_take_a_document_as_text(tokenizer_dir: Path, name: str, problem: str | None):
    encoder = encode.Encoder(tokenizer_dir, problem=problem)
    assert encoder.name == name
    assert encoded(encoder, HARD) == exact(tokenizer_dir, HARD)
    assert encoded(encoder, []) == []


def test_what_the_caller_has_is_not_loaded_again(tokenizer_dir: Path, monkeypatch):
    expected = exact(tokenizer_dir, HARD)
    loaded, made = load_tokenizer(tokenizer_dir), read_tokenizer(tokenizer_dir)
    monkeypatch.delattr(encode, "load_tokenizer")
    monkeypatch.delattr("fastokens.Tokenizer.from_file")
    encoder = encode.Encoder(tokenizer_dir, made=made, exact=loaded)
    assert encoder.name == "fastokens"
    assert encoded(encoder, HARD) == expected


def test_merges_become_strings_where_these_say_the_same():
    def short(*merges) -> list[str] | None:
        text = encode._with_short_merges({"version": "1.0", "model": {"type": "BPE", "merges": merges}})
        return text and json.loads(text)["model"]["merges"]

    assert short(["t", "he"], ["Ġ", "the"]) == ["t he", "Ġ the"]
    assert short(["t", "he"], ["a b", "c"]) is None  # "a b c" is two merges
    assert short("t he", "Ġ the") is None  # are strings already
    assert short() is None


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Save a tokenizer trained on a sentence."""

    def save(tokenizer: Tokenizer, trainer: trainers.Trainer) -> Path:
        tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 9], trainer)
        tokenizer.add_special_tokens(["<|endoftext|>"])
        tokenizer.add_tokens([AddedToken("<extra>", lstrip=True), AddedToken("fox", single_word=True)])
        (tmp_path / "tokenizer").mkdir()
        tokenizer.save(str(tmp_path / "tokenizer/tokenizer.json"))
        (tmp_path / "tokenizer/tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
        return tmp_path / "tokenizer"

    return save


UNSUPPORTED = {
    "Unigram": (Tokenizer(models.Unigram()), trainers.UnigramTrainer(unk_token="<unk>", vocab_size=60)),
    "WordPiece": (Tokenizer(models.WordPiece(unk_token="<unk>")), trainers.WordPieceTrainer(vocab_size=90)),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_a_tokenizer_that_is_not_supported_is_used_all_the_same(
    kind: str, save, tokenize, tmp_path: Path, write_jsonl, caplog
):
    tokenizer, trainer = UNSUPPORTED[kind]
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.normalizer = normalizers.NFKC()
    trainer.special_tokens, trainer.show_progress = ["<unk>"], False
    directory = save(tokenizer, trainer)
    texts = ["the lazy fox", "<|endoftext|> dog <extra> quick"]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    status, stderr, record = tokenize(path, tokenizer=directory, valid=0.0, test=0.0)
    assert status == 0, stderr
    assert "encoding with `tokenizers`, slower: fastokens: " in caplog.text
    counts = files.read_json(record)["counts"]
    assert (counts["encoder"], counts["checked"]) == ("tokenizers", 0)
    assert "unsupported" in counts["fallback"]
    end = tokenizer_info(directory).eos_id
    read = sequences(record, "train")
    assert read == [[*ids, end] for ids in exact(directory, texts)]


@pytest.fixture
def differ_in_z(tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Let fastokens give the id of "y" for each "z" of a document, not of the probes; returns that id."""
    flat = encode._flat
    (y,), (z,) = exact(tokenizer_dir, ["y", "z"])

    def wrong(tokenizer, texts, plain):
        ids, starts = flat(tokenizer, texts, plain)
        ids = ids.copy()
        if texts[0] != encode.PROBES[0]:
            ids[ids == z] = y
        return ids, starts

    monkeypatch.setattr(encode, "_flat", wrong)
    return y


def test_a_document_with_other_ids_is_named_and_the_shard_is_encoded_again(
    tokenize, tmp_path: Path, tokenizer_dir: Path, write_jsonl, differ_in_z, monkeypatch, caplog
):
    monkeypatch.setattr("snaketron.data.text.reading.BATCH_DOCUMENTS", 3)
    texts = ["one", "two", "three", "four", "qqz", "six"]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    status, stderr, record = tokenize(path, valid=0.0, test=0.0)
    assert status == 0, stderr
    z = exact(tokenizer_dir, ["z"])[0][0]
    detail = f"{path}:5: token 2 is {differ_in_z}, `tokenizers` gives {z}"
    assert f"encoding all of this shard again with `tokenizers`, slower: fastokens: {detail}" in caplog.text
    counts = files.read_json(record)["counts"]
    assert (counts["encoder"], counts["fallback"], counts["documents"]) == ("tokenizers", detail, 6)
    read = [ids[:-1] for ids in sequences(record, "train")]
    assert read == exact(tokenizer_dir, texts)


def test_a_tokenizer_that_differs_in_the_probes_is_not_used(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch, caplog
):
    load = encode._load
    value = json.loads((tokenizer_dir / "tokenizer.json").read_text())
    value["model"]["merges"] = []
    (tmp_path / "other.json").write_text(json.dumps(value))
    monkeypatch.setattr(encode, "_load", lambda *_: load(tmp_path / "other.json"))
    encoder = encode.Encoder(tokenizer_dir)
    assert encoder.name == "tokenizers"
    assert 'fastokens: in "The quick brown' in caplog.text
    assert encoded(encoder, HARD) == exact(tokenizer_dir, HARD)


def test_the_first_the_longest_and_some_of_the_others_are_compared(tokenizer_dir: Path, monkeypatch):
    compared: list[int] = []
    compare = encode.Encoder._compare
    encoder = encode.Encoder(tokenizer_dir)
    monkeypatch.setattr(
        encode.Encoder, "_compare", lambda self, i, *rest: compared.append(i) or compare(self, i, *rest)
    )
    texts = ["a" * 500] * 110 + ["b" * 5000] + ["c" * 100] * 10_000
    encoder.encode(texts)
    assert compared[:101] == [*range(100), 110]  # the first 50,000 characters, and the longest
    assert len(compared) in (101 + 4, 101 + 5, 101 + 6)  # one of 2000 of the others
    assert encoder.num_checked == len(compared)


def test_of_a_very_long_document_the_beginning_is_compared(tokenizer_dir: Path):
    encoder = encode.Encoder(tokenizer_dir)
    text = "word " * 30_000
    assert encoded(encoder, [text]) == exact(tokenizer_dir, [text])
    assert encoder.num_checked == 1


def test_a_batch_that_fastokens_refuses_is_encoded_by_tokenizers(tokenizer_dir: Path, monkeypatch, caplog):
    encoder = encode.Encoder(tokenizer_dir)

    def refuse(*_):
        raise ValueError("match limit exceeded")

    monkeypatch.setattr(encode, "_flat", refuse)
    caplog.set_level(logging.WARNING)
    assert encoded(encoder, HARD) == exact(tokenizer_dir, HARD)
    assert "fastokens fails (match limit exceeded)" in caplog.text


def test_a_document_beyond_both_encoders_is_a_bad_row(
    tokenize, tmp_path: Path, tokenizer_dir: Path, write_jsonl, monkeypatch
):
    """A text of 20 MB of spaces is one: the regular expressions of both encoders give up on it."""
    flat, exactly = encode._flat, encode.Encoder._exactly

    def refuse(texts):
        if any(text.startswith("zz") for text in texts):
            raise ValueError("match limit exceeded")

    monkeypatch.setattr(encode, "_flat", lambda t, texts, plain: refuse(texts) or flat(t, texts, plain))
    monkeypatch.setattr(encode.Encoder, "_exactly", lambda self, texts: refuse(texts) or exactly(self, texts))
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in ("one", "zzz", "two", "zzzz")])
    status, stderr, _ = tokenize(path, valid=0.0, test=0.0)
    assert (status, "a.jsonl:2: the tokenizer gives up on this text of 3 characters" in stderr) == (1, True)
    policy = {"bad_rows": "drop", "max_dropped_fraction": 0.5}
    _, _, record = tokenize(path, valid=0.0, test=0.0, **policy)
    assert files.read_json(record)["counts"]["dropped"] == {"bad row": 2}
    read = [ids[:-1] for ids in sequences(record, "train")]
    assert read == exact(tokenizer_dir, ["one", "two"])
    status, stderr, _ = tokenize(path, bad_rows="drop")
    assert (status, "2 of 4 rows are bad or invalid" in stderr) == (1, True)


def test_a_tokenizer_that_drops_merges_at_random_is_refused(save):
    tokenizer = Tokenizer(models.BPE(dropout=0.1))
    directory = save(tokenizer, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    with pytest.raises(UserError, match="dropout"):
        encode.Encoder(directory)
