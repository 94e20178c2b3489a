"""datatrove's word tokenizers, faster: the same words.

datatrove lets spaCy forget every word after each document, so that memory does not grow; most of the time is
spent on learning them again. Here the words of the first text stay known.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from datatrove.utils.text import TextNormConfig
from datatrove.utils.text import simplify_text as datatrove_simplify_text
from datatrove.utils.word_tokenizers import SpaCyTokenizer, load_word_tokenizer

LEARN_CHARACTERS = 20_000_000  # whose words stay known: some 100 MB


def learn(language: str) -> None:
    """Let datatrove's word tokenizer of a language remember the words of the first text that it sees."""
    words = load_word_tokenizer(language)  # one object for all blocks
    if not isinstance(words, SpaCyTokenizer) or "_do_tokenize" in vars(words):
        return
    spacy, do_tokenize = words.tokenizer, words._do_tokenize
    forgetting, seen = spacy.memory_zone, 0

    def counted(text: str) -> Any:
        nonlocal seen
        seen += len(text)
        return do_tokenize(text)

    def zone() -> Any:
        return contextlib.nullcontext() if seen < LEARN_CHARACTERS else forgetting()

    words._do_tokenize = counted  # type: ignore[method-assign]
    spacy.memory_zone = zone


def simplify_text(text: str, config: TextNormConfig) -> str:
    """datatrove's text for comparison; it looks for diacritics where there may be some."""
    if text.isascii() and config.norm_unicode_diacritics:
        config = dataclasses.replace(config, norm_unicode_diacritics=False)
    return datatrove_simplify_text(text, config)
