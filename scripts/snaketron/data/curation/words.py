"""datatrove's word tokenizers, faster: the same words.

datatrove lets spaCy forget every word after each document, so that memory does not grow; most of the time is
spent on learning them again. Here the words of the first text stay known.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any

from datatrove.utils.text import TextNormConfig
from datatrove.utils.text import simplify_text as datatrove_simplify_text
from datatrove.utils.word_tokenizers import SpaCyTokenizer, load_word_tokenizer

LEARN_CHARACTERS = 20_000_000  # the words of so much text stay known: some 100 MB


def learn(language: str) -> None:
    """Let datatrove's word tokenizer of a language remember the words of the first text that it sees."""
    words = load_word_tokenizer(language)  # one object for all blocks
    if not isinstance(words, SpaCyTokenizer) or "_do_tokenize" in vars(words):
        return
    with _without_torch():
        spacy = words.tokenizer
    do_tokenize = words._do_tokenize
    forgetting, seen = spacy.memory_zone, 0

    def counted(text: str) -> Any:
        nonlocal seen
        seen += len(text)
        return do_tokenize(text)

    def zone() -> Any:
        return contextlib.nullcontext() if seen < LEARN_CHARACTERS else forgetting()

    def split(text: str) -> list[str]:
        nonlocal seen
        if words.language == "ja":  # datatrove splits a Japanese text in parts first
            return whole_split(text)
        try:
            with zone():
                spacy.max_length = len(text)
                seen += len(text)
                return [word for token in spacy.make_doc(text) if (word := token.text.strip())]
        except Exception:  # datatrove knows what to do where spaCy fails
            return whole_split(text)

    whole_split = words.word_tokenize  # datatrove's own, which looks for sentences, too
    words._do_tokenize = counted  # type: ignore[method-assign]
    words.word_tokenize = split  # type: ignore[method-assign]
    spacy.memory_zone = zone


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Let spaCy not find torch, which it imports if it can: 3 s and 600 MB for nothing."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


def simplify_text(text: str, config: TextNormConfig) -> str:
    """datatrove's text for comparison, faster: a table takes out the diacritics, if the text is not ASCII."""
    if not config.norm_unicode_diacritics:
        return datatrove_simplify_text(text, config)
    text = datatrove_simplify_text(text, dataclasses.replace(config, norm_unicode_diacritics=False))
    if text.isascii():
        return text
    return unicodedata.normalize("NFD", text).translate(_without_marks).strip()


class _WithoutMarks(dict[int, str | None]):
    def __missing__(self, code: int) -> str | None:
        character = chr(code)
        self[code] = None if unicodedata.category(character) == "Mn" else character
        return self[code]


_without_marks = _WithoutMarks()
