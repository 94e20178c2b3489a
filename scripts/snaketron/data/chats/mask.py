"""From the text of a conversation to token ids, and for each whether the assistant wrote it.

A byte-level tokenizer spells a text byte by byte. So the place of a token follows from the lengths of the
tokens before it, and the fast encoder, which tells ids only, can be used. Any other tokenizer must tell the
place of each token, and that is slow.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from snaketron.data.chats.conversation import Span
from snaketron.data.chats.probes import PROBE
from snaketron.data.encode import Encoder
from snaketron.data.tokenizer import load_tokenizer

import numpy as np

if TYPE_CHECKING:
    from snaketron.data.chats.template import Template

    from tokenizers import Encoding, Tokenizer


class Masker:
    """Encodes rendered conversations. `problem` and the exceptions are those of `Encoder`."""

    def __init__(self, directory: Path, *, problem: str | None = None) -> None:
        self.directory = directory
        self.tokenizer = load_tokenizer(directory)
        self._lengths = byte_lengths(self.tokenizer)
        self._encoder = None
        if self._lengths is not None:
            self._encoder = Encoder(directory, plain=False, problem=problem, exact=self.tokenizer)

    @property
    def name(self) -> str:
        """The encoder that makes the ids."""
        return "tokenizers" if self._encoder is None else self._encoder.name

    def encode(
        self, texts: Sequence[str], spans: Sequence[Iterable[Span]]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids (int32) of each text, and which of them hold any of one of its spans (uint8)."""
        if self._encoder is None or self._lengths is None:
            encodings = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
            return [masked(encoding, marks) for encoding, marks in zip(encodings, spans, strict=True)]
        ids, starts = self._encoder.encode(texts)
        ids = ids.astype(np.int32)
        lengths = self._lengths[ids]
        made = []
        for (first, last), text, marks in zip(pairwise(starts), texts, spans, strict=True):
            ends = np.cumsum(lengths[first:last])
            size = len(text) if text.isascii() else len(text.encode())
            if (ends[-1] if len(ends) else 0) != size:  # a token took spaces around it along
                made.append(tokenize(self.tokenizer, text, marks))
                continue
            loss_mask = np.zeros(len(ends), dtype=np.uint8)
            begins = ends - lengths[first:last]
            for start, end in marks if size == len(text) else in_bytes(text, marks):
                loss_mask[np.searchsorted(ends, start, side="right") : np.searchsorted(begins, end)] = 1
            made.append((ids[first:last], loss_mask))
        return made


def end_of_turn(template: Template, tokenizer: Tokenizer) -> int | None:
    """The token that ends an answer: the last one that a tuning on this template trains; None without one."""
    before, tools, arguments = next(template.probes())
    rendered = template.render([*before, PROBE[1]], tools, arguments)
    start, end = rendered.spans[-1]
    ids = tokenizer.encode(rendered.text[start:end].rstrip(), add_special_tokens=False).ids
    return ids[-1] if ids else None


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray | None:
    """How many bytes each id stands for (int64); None for a tokenizer that does not spell a text in bytes."""
    if tokenizer.normalizer is not None or tokenizer.pre_tokenizer is None:
        return None
    steps = json.loads(tokenizer.pre_tokenizer.__getstate__())  # what its part of tokenizer.json says
    levels = [s for s in steps.get("pretokenizers", [steps]) if s.get("type") == "ByteLevel"]
    if not levels or any(level["add_prefix_space"] for level in levels):
        return None
    vocabulary = tokenizer.get_vocab()
    lengths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, number in vocabulary.items():
        lengths[number] = len(token)  # one character stands for one byte
    for number, added in tokenizer.get_added_tokens_decoder().items():
        lengths[number] = len(added.content.encode())
    return lengths


def in_bytes(text: str, spans: Iterable[Span]) -> list[Span]:
    """Spans in characters, in their order, as spans in bytes."""
    found, character, byte = [], 0, 0
    for span in spans:
        ends = []
        for position in span:
            byte += len(text[character:position].encode())
            character = position
            ends.append(byte)
        found.append((ends[0], ends[1]))
    return found


def tokenize(tokenizer: Tokenizer, text: str, spans: Iterable[Span]) -> tuple[np.ndarray, np.ndarray]:
    """Ids (int32) of the text, and which of them hold any of a span (uint8).

    A space before an answer is one token with the answer's first word in many tokenizers. That token is
    trained, although it also holds some of the prompt.
    """
    return masked(tokenizer.encode(text, add_special_tokens=False), spans)


def masked(encoding: Encoding, spans: Iterable[Span]) -> tuple[np.ndarray, np.ndarray]:
    """Like `tokenize`, for a text that is encoded already."""
    input_ids = np.array(encoding.ids, dtype=np.int32)
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    loss_mask = np.zeros(len(input_ids), dtype=np.uint8)
    starts, ends = offsets[:, 0], offsets[:, 1]
    for start, end in spans:
        first = np.searchsorted(ends, start, side="right")
        here = slice(first, np.searchsorted(starts, end, side="right"))
        # Some tokenizers cut spaces off the offsets: a token of spaces only is empty, and lies at its end.
        empty = starts[here] == ends[here]
        loss_mask[here] |= np.where(empty, starts[here] > start, starts[here] < end).astype(np.uint8)
    return input_ids, loss_mask
