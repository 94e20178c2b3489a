"""Plain text to token ids: by `fastokens` as long as it gives what `tokenizers` gives, else by `tokenizers`.

The ids are those of `tokenizers`, always. That `fastokens` gives the same ones is checked: for texts that
are known to be hard when the tokenizer is loaded, then for a sample of the documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snaketron.data.tokenizer import load_tokenizer
from snaketron.log import UserError, logger

import numpy as np
import orjson

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# `tokenizers` takes about 30 times as long as `fastokens`: comparing costs some 2 % of the time, and at least
# 0.05 s. Compared are the first documents, each that is far longer than those before, and a sample of all.
SAMPLE = 2000  # one document in so many is compared
FIRST_CHARACTERS = 50_000  # the first documents, up to so many characters together
MAX_CHARACTERS = 50_000  # of a longer document, so much of its beginning is compared

PROBES = (
    "The quick brown fox doesn't jump; it's 3.14159 + 1,000,000 = ?\n\n\n",
    "def f(x):\n\treturn {'a': [1, 2],  \r\n        'b': x[::-1]}   # ok   \n ",
    "a\0b \x7f \u00a0 \u200b \u2028 \ufeff \ufffd \uffff \U0010ffff",
    "naïve café e\u0301 ﬁ \uff21 ß İ ǅ ½ ² ΑΩ привет שלום مرحبا नमस्ते 日本語の文章 한국어 ไทย",
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽 ☃️ \U0001d4b3 ١٢٣ ६७ Ⅷ",
    " ",
    "     x     " * 20,
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa" * 20,
    "[CLS] <s> </s> <unk> <|endoftext|> <0x0A> ▁ Ġ Ċ ##ing @@ </w>",
)
_MAX_PROBED_TOKENS = 200


class _OfDocument(Exception):
    """What is wrong with document `index` of a batch."""

    def __init__(self, index: int, detail: str) -> None:
        super().__init__(detail)
        self.index = index


class Mismatch(_OfDocument):
    """The encoders give a document different ids; the message says which."""


class Unencodable(_OfDocument):
    """Neither encoder can encode a document; the message says why."""


class Encoder:
    """Encodes batches of documents.

    Where a document spells a control token, it gets the ids of the characters; with `plain=False` it gets the
    id of the token, as the text of a chat template must. `problem` says why fastokens cannot be used:
    `tokenizers` encodes everything then. `num_checked` documents were compared.

    What the caller has is not loaded again: `made`, which is what tokenizer.json says, and `exact`, which is
    what `load_tokenizer` returned.
    """

    def __init__(
        self,
        directory: Path,
        *,
        plain: bool = True,
        problem: str | None = None,
        made: Mapping[str, Any] | None = None,
        exact: Tokenizer | None = None,
    ) -> None:
        path = directory / "tokenizer.json"
        self._plain = plain
        self._exact = exact or load_tokenizer(directory)
        if plain:
            self._exact.encode_special_tokens = True
        if getattr(self._exact.model, "dropout", None):
            raise UserError(f"{path}: its model drops merges at random (dropout); set dropout to null")
        self._num_seen = self._num_characters = self._longest = self.num_checked = 0
        self._fast: Any = None
        self.problem = problem  # why fastokens is not used
        if not problem:
            try:
                self._fast = _load(path, made)
                self._probe()
            except Exception as error:
                logger.warning("%s: encoding with `tokenizers`, slower: fastokens: %s", path, error)
                self._fast, self.problem = None, str(error)

    @property
    def name(self) -> str:
        return "tokenizers" if self._fast is None else "fastokens"

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all `texts` (uint32), and offsets: text i has ids[starts[i] : starts[i + 1]].

        Raises `Mismatch` when the encoders give a compared document different ids; all ids before it are in
        doubt then. Raises `Unencodable` when neither encoder can encode a document.
        """
        try:
            if self._fast is None:
                return self._exactly(texts)
            ids, starts = _flat(self._fast, texts, self._plain)
        except BaseException as error:
            if not _is_failure(error):
                raise
            return self._one_by_one(texts)
        for index in self._sample(texts):
            self._compare(index, texts[index], ids[starts[index] : starts[index + 1]])
            self.num_checked += 1
        return ids, starts

    def _one_by_one(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Like `encode`, for a batch in which one text makes an encoder fail: each text by itself."""
        found = []
        for index, text in enumerate(texts):
            try:
                found.append(
                    self._exactly([text]) if self._fast is None else _flat(self._fast, [text], self._plain)
                )
            except BaseException as error:
                if not _is_failure(error):
                    raise
                found.append(self._last_resort(index, text, error))
        starts = np.cumsum([0, *(len(ids) for ids, _ in found)])
        return np.concatenate([ids for ids, _ in found]), starts

    def _last_resort(self, index: int, text: str, error: BaseException) -> tuple[np.ndarray, np.ndarray]:
        if self._fast is not None:
            logger.warning("fastokens fails (%s): `tokenizers` encodes a text of %d", error, len(text))
            try:
                return self._exactly([text])
            except BaseException as second:
                if not _is_failure(second):
                    raise
                error = second
        raise Unencodable(index, f"the tokenizer gives up on this text of {len(text)} characters ({error})")

    def _exactly(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encodings = self._exact.encode_batch_fast(texts, add_special_tokens=False)
        starts = np.cumsum([0, *map(len, encodings)])
        ids = np.empty(starts[-1], np.uint32)
        for (start, end), encoding in zip(pairwise(starts), encodings, strict=True):
            ids[start:end] = encoding.ids
        return ids, starts

    def _sample(self, texts: Sequence[str]) -> Iterator[int]:
        """The indices of the documents to compare; they follow from the documents so far alone."""
        for index, text in enumerate(texts):
            spread = self._num_seen * 2654435761 % 2**32 < 2**32 // SAMPLE  # evenly, but not periodic
            if spread or self._num_characters < FIRST_CHARACTERS or len(text) > 2 * self._longest:
                self._longest = max(self._longest, len(text))
                yield index
            self._num_seen += 1
            self._num_characters += len(text)

    def _compare(self, index: int, text: str, ids: np.ndarray) -> None:
        if len(text) > MAX_CHARACTERS:
            text = text[:MAX_CHARACTERS]
            ids, _ = _flat(self._fast, [text], self._plain)
        expected, _ = self._exactly([text])
        if np.array_equal(ids, expected):
            return
        shared = min(len(ids), len(expected))
        different = np.flatnonzero(ids[:shared] != expected[:shared])
        at = int(different[0]) if len(different) else shared
        found = [str(i[at]) if at < len(i) else "the end" for i in (ids, expected)]
        raise Mismatch(index, f"token {at} is {found[0]}, `tokenizers` gives {found[1]}")

    def _probe(self) -> None:
        added = [token.content for token in self._exact.get_added_tokens_decoder().values()]
        texts = [*PROBES, *(f"a{token} {token}\n{token}" for token in added[:_MAX_PROBED_TOKENS])]
        ids, starts = _flat(self._fast, texts, self._plain)
        for index, text in enumerate(texts):
            try:
                self._compare(index, text, ids[starts[index] : starts[index + 1]])
            except Mismatch as error:
                raise ValueError(f"in {text!r}, {error}") from None


def _is_failure(error: BaseException) -> bool:
    """Whether an encoder failed, for example at a limit of its regular expressions, on 20 MB of spaces.

    A panic of Rust code is no `Exception`.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _load(path: Path, made: Mapping[str, Any] | None = None) -> Any:
    """The `fastokens` tokenizer of a file, which says `made`; `ValueError` if it is not supported."""
    from fastokens import Tokenizer

    text = made and _with_short_merges(made)
    tokenizer = Tokenizer.from_json_str(text) if text else Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _with_short_merges(made: Mapping[str, Any]) -> str | None:
    """A tokenizer.json that spells each merge as one string ("t he") and not as a pair (["t", "he"]).

    fastokens reads 131,000 strings in 0.77 s, as many pairs in 0.93 s. None where the merges are no pairs,
    or one of them has a space in it, so that a string could be two merges.
    """
    model = made["model"]
    merges = model.get("merges") or [""]
    if {*map(type, merges)} != {list} or {*map(len, merges)} != {2}:
        return None
    short = list(map(" ".join, merges))
    if "".join(short).count(" ") != len(short):
        return None
    return orjson.dumps({**made, "model": {**model, "merges": short}}).decode()


def _flat(tokenizer: Any, texts: Sequence[str], plain: bool) -> tuple[np.ndarray, np.ndarray]:
    ids, starts = tokenizer.encode_batch_flat(list(texts), False, plain)  # no special tokens are added
    return np.frombuffer(ids, "<u4"), np.frombuffer(starts, "<u8").astype(np.int64)
