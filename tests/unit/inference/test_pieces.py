"""The pieces of an answer are together the text of its tokens, in each kind of tokenizer, without delay."""

from __future__ import annotations

import random
from collections.abc import Callable

from snaketron.data.tokenizer import train
from snaketron.inference.pieces import UNCERTAIN, Ends, Pieces

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models

WORDS = ["▁", "▁the", "▁▁", "a", ".", "'", "▁'s", "日", "é", "▁don", "t", ",", " ", "\n", "\ufffd"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# As those of Llama, of Gemma, and of T5: sentencepiece's.
LLAMA = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
GEMMA = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def tokenizer_of(words: list[str], decoder: decoders.Decoder | None) -> Tokenizer:
    """A tokenizer whose tokens are `words`. The last two are added tokens, and a model writes both."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, words[0]))
    if decoder:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True)])
    tokenizer.add_tokens([AddedToken("<think>")])
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "trained": lambda: train(["the fox, the dog. 日本 é \U0001f600 \U0001f600 don't"] * 3, 300),
    "llama": lambda: tokenizer_of(BYTES + WORDS, LLAMA),
    "gemma": lambda: tokenizer_of(BYTES + WORDS, GEMMA),
    "t5": lambda: tokenizer_of(WORDS, decoders.Metaspace()),
    "bert": lambda: tokenizer_of(
        ["the", "##s", "##n", ".", "'", "##'", "!", "do", "n't"], decoders.WordPiece()
    ),
    "gpt": lambda: tokenizer_of(["the</w>", "fo", "x</w>", ".</w>", "a"], decoders.BPEDecoder()),
    "words": lambda: tokenizer_of(WORDS, None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_random_tokens_are_the_whole_text(kind: str):
    tokenizer = KINDS[kind]()
    size, draw = tokenizer.get_vocab_size(), random.Random(kind)
    for _ in range(3000):
        # Any tokens, with an id that the tokenizer does not know, or three tokens that repeat.
        among = range(size + 1) if draw.random() < 0.5 else draw.sample(range(size), 3)
        ids = draw.choices(among, k=draw.randint(0, 25))
        pieces = Pieces(tokenizer)
        said = [pieces.add(token) for token in ids]
        assert "".join(said) + pieces.rest() == tokenizer.decode(ids, skip_special_tokens=False), ids


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_ends_with_the_token_that_completes_a_text(kind: str):
    """As when the whole answer is decoded for each token, which took a time that grows with its square."""
    tokenizer = KINDS[kind]()
    size, draw = tokenizer.get_vocab_size(), random.Random(kind)
    for _ in range(3000):
        ids = draw.choices(draw.sample(range(size), draw.randint(3, size)), k=draw.randint(1, UNCERTAIN))
        texts = [tokenizer.decode(ids[:number], skip_special_tokens=True) for number in range(len(ids) + 1)]
        begin = draw.randrange(len(texts[-1]) + 1)
        asked = [text for text in (texts[-1][begin : begin + draw.randint(1, 4)], " the") if text]
        ends = Ends(tokenizer, asked)
        said = [ends.add(token) for token in ids]
        expected = [any(end in text for end in asked) for text in texts[1:]]
        assert [*said, True].index(True) == [*expected, True].index(True), (ids, asked)


def test_a_piece_comes_with_its_token():
    """Characters of several tokens come with the last one, in a row of bytes with what follows the row."""
    tokenizer = KINDS["trained"]()
    pieces = Pieces(tokenizer)
    said = [pieces.add(token) for token in tokenizer.encode("the fox \U0001f680 the").ids]
    assert said == ["the", " fox", "", "", " \U0001f680", " the"] and pieces.rest() == ""
    tokenizer = KINDS["llama"]()
    pieces = Pieces(tokenizer)
    row = [f"<0x{byte:02X}>" for byte in "\U0001f600".encode()]
    given = ["▁the", "▁the", *row, "a", "▁"]
    said = [pieces.add(tokenizer.token_to_id(token)) for token in given]
    assert said == ["the", " the", "", "", "", "", "\U0001f600a", " "]


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_of_any_tokens_is_decoded_a_few_times(kind: str, monkeypatch: pytest.MonkeyPatch):
    """The whole answer was decoded for each token, a thousand times here."""
    tokenizer, decoded = KINDS[kind](), 0
    decode = Pieces._decode

    def counted(pieces: Pieces, begin: int) -> str:
        nonlocal decoded
        decoded += len(pieces._ids) - begin
        return decode(pieces, begin)

    monkeypatch.setattr(Pieces, "_decode", counted)
    draw = random.Random(kind)
    size = tokenizer.get_vocab_size()
    for ids in (draw.choices(range(size), k=2000), *([token] * 2000 for token in range(size))):
        decoded, pieces = 0, Pieces(tokenizer)
        for token in ids:
            pieces.add(token)
        pieces.rest()
        assert decoded <= 10 * len(ids), (tokenizer.id_to_token(ids[0]), decoded)
        decoded, ends = 0, Ends(tokenizer, ["no such text"])
        assert not any(ends.add(token) for token in ids)
        assert decoded <= 25 * len(ids), (tokenizer.id_to_token(ids[0]), decoded)
