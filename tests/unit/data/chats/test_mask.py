"""Ids and masks of texts: the places of tokens from their lengths, and from the tokenizer itself."""

from __future__ import annotations

import random
from pathlib import Path

from snaketron.data import encode
from snaketron.data.chats import mask as masks
from snaketron.data.chats.mask import Masker, in_bytes, tokenize
from tests.unit.data.chats.chat_samples import build_tokenizer, question, save_tokenizer, write_jsonl
from tests.unit.data.chats.golden import CASES, compiled
from tests.unit.data.chats.rendering import arguments, render_files

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers

PARTS = ["a", "What is", " two", "\n\n", "  ", "é", "東京", "🙂", "👩‍👧", "<|im_end|>", "<think>", "\t", "0"]


def saved(directory: Path, tokenizer: Tokenizer) -> Masker:
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    return Masker(directory)


def random_texts(count: int) -> tuple[list[str], list[list[tuple[int, int]]]]:
    """Texts, and spans of each that do not touch, at any characters."""
    draw = random.Random(0)
    texts = ["".join(draw.choices(PARTS, k=draw.randrange(30))) for _ in range(count)]
    spans = []
    for text in texts:
        cuts = sorted(draw.sample(range(len(text) + 1), min(len(text) + 1, 2 * draw.randrange(4)) // 2 * 2))
        spans.append(list(zip(cuts[::2], cuts[1::2], strict=True)))
    return texts, spans


def test_places_from_lengths_are_those_that_the_tokenizer_says(tmp_path):
    masker = saved(tmp_path / "t", build_tokenizer())
    assert masker.name == "fastokens"
    texts, spans = random_texts(500)
    assert sum(len(part) for part in spans) > 300
    for text, marks, (ids, mask) in zip(texts, spans, masker.encode(texts, spans), strict=True):
        expected_ids, expected_mask = tokenize(build_tokenizer(), text, marks)
        assert ids.tolist() == expected_ids.tolist() and ids.dtype == expected_ids.dtype
        assert mask.tolist() == expected_mask.tolist() and mask.dtype == expected_mask.dtype


@pytest.mark.parametrize("name", ["shipped", "other"])
def test_conversations_have_the_masks_that_the_tokenizer_says(tmp_path, name):
    masker = saved(tmp_path / "t", build_tokenizer())
    from snaketron.data.chats import conversation

    for case in CASES:
        found = conversation.conversation(case.messages, case.tools)
        made = compiled(name).render(found.messages, found.tools)
        expected = tokenize(build_tokenizer(), made.text, made.spans)
        for ours, theirs in zip(masker.encode([made.text], [made.spans])[0], expected, strict=True):
            assert ours.tolist() == theirs.tolist()


def test_spans_in_bytes():
    assert in_bytes("aé東🙂b", [(0, 1), (1, 3), (4, 5)]) == [(0, 1), (1, 6), (10, 11)]


def test_a_tokenizer_that_changes_the_text_says_itself_where_its_tokens_lie(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.normalizer = normalizers.NFC()
    masker = saved(tmp_path / "t", tokenizer)
    assert masker.name == "tokenizers" and masks.byte_lengths(tokenizer) is None
    text = "e\u0301 Paris"
    ((ids, mask),) = masker.encode([text], [[(0, 2)]])
    assert tokenizer.decode(ids[mask == 1].tolist()) == build_tokenizer().decode(
        build_tokenizer().encode("é").ids
    )


def test_a_token_that_takes_spaces_along_is_placed_by_the_tokenizer(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    masker = saved(tmp_path / "t", tokenizer)
    texts, spans = ["two  <mask> two", "two"], [[(3, 11)], [(0, 3)]]
    for text, marks, (ids, mask) in zip(texts, spans, masker.encode(texts, spans), strict=True):
        expected_ids, expected_mask = tokenize(tokenizer, text, marks)
        assert (ids.tolist(), mask.tolist()) == (expected_ids.tolist(), expected_mask.tolist())
        assert mask.sum() >= 1


def test_a_conversation_with_other_ids_makes_the_shard_be_rendered_again(tmp_path, monkeypatch, caplog):
    save_tokenizer(tmp_path / "tokenizer")
    chats = write_jsonl(tmp_path / "a.jsonl", [{"messages": question("a", "b" * i)} for i in range(1, 9)])
    expected, counts = render_files(tmp_path, chats)
    assert counts["encoder"] == "fastokens"
    flat = encode._flat

    def wrong(tokenizer, texts, plain):
        ids, starts = flat(tokenizer, texts, plain)
        ids = ids.copy()
        if any("bbbb<|im_end|>" in text for text in texts):
            ids[starts[-2]] += 1
        return ids, starts

    monkeypatch.setattr(encode, "_flat", wrong)
    rows, counts = render_files(tmp_path, chats)
    assert rows == expected and counts["encoder"] == "tokenizers" and counts["rows"] == 8
    assert "rendering again, with `tokenizers`" in caplog.text


def test_a_text_that_no_encoder_takes_is_named(tmp_path, monkeypatch):
    import render_chat
    from snaketron.log import UserError

    save_tokenizer(tmp_path / "tokenizer")
    chats = write_jsonl(tmp_path / "a.jsonl", [{"messages": question("a", "b")}] * 3)

    def refuse(_self, _texts):
        raise encode.Unencodable(1, "the tokenizer gives up")

    monkeypatch.setattr(encode.Encoder, "encode", refuse)
    with pytest.raises(UserError, match=r"a\.jsonl:2: the tokenizer gives up; remove the row"):
        render_chat.main(arguments(tmp_path, chats))
