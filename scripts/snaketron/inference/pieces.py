"""The text of an answer in pieces, as its tokens come: together the text of all of them, in linear time."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenizers import Tokenizer

UNCERTAIN = 16  # tokens whose text is looked at before it is certain

_BYTE = re.compile("<0x..>")  # a token of byte fallback


class Pieces:
    """Decodes the tokens since the last place at which no later token can change the text before it.

    Such a place is not within a character, nor within a row of bytes: a byte that is no text makes the others
    of its row none. Decoders leave out the space of a first word, so the tokens of the piece before are
    decoded, too, as long as they have a text of their own. `DecodeStream` of tokenizers 0.23 raises where a
    byte makes others no text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._begin = self._last = 0  # where decoding begins, and the last of these places
        self._before = ""  # the text between the two
        self._next = 0  # tokens that have to be there until it is worth while to decode again

    def add(self, token: int) -> str:
        """The text that is certain now; empty where a token is only a part of it."""
        name = self._tokenizer.id_to_token(token)
        if name is None:  # a model may have room for more tokens
            return ""
        self._ids.append(token)
        if len(self._ids) < self._next or _BYTE.fullmatch(name):
            return ""
        text = self._decode(self._begin)
        if len(text) <= len(self._before) or text.endswith("\ufffd"):  # which may be a part of a character
            # One has four tokens at the most. A long row of bytes that are no text is not decoded each time.
            self._next = len(self._ids) + (len(self._ids) - self._last) // 4
            return ""
        piece, self._before = text[len(self._before) :], text
        if own := self._decode(self._last):
            self._begin, self._last, self._before = self._last, len(self._ids), own
        return piece

    def rest(self) -> str:
        """What is left when there are no more tokens."""
        return self._decode(self._begin)[len(self._before) :]

    def uncertain(self) -> str:
        """What would be left now; empty where so many tokens have no certain text that it would take long."""
        return self.rest() if len(self._ids) - self._last <= UNCERTAIN else ""

    def _decode(self, begin: int) -> str:
        text: str = self._tokenizer.decode(self._ids[begin:], skip_special_tokens=False)
        return text


class Ends:
    """Whether an answer without special tokens has one of the texts that end it, as its tokens come."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        self._pieces = Pieces(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        self._without_text = {number for number, token in added.items() if token.special}
        self._texts, self._longest = texts, max(map(len, texts), default=0)
        self._said = ""  # the end of the answer, in which one of the texts may have begun

    def add(self, token: int) -> bool:
        """Whether the text with this token has one of them."""
        if not self._texts or token in self._without_text:
            return False
        self._said += self._pieces.add(token)
        here = self._said + self._pieces.uncertain()
        self._said = self._said[-self._longest :]
        return any(text in here for text in self._texts)
