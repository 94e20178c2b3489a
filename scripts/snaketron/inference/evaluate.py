"""What a checkpoint knows of data that no training has seen: losses, exact answers, tasks of lm-eval."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from snaketron.config.data import CALL
from snaketron.data.chats.blend import Source, check_packed_blend
from snaketron.data.chats.mask import byte_lengths
from snaketron.data.chats.packs import Pack, PackedDataset
from snaketron.files import read_json
from snaketron.inference.generate import finish_reason, generate
from snaketron.inference.score import Scores, score
from snaketron.model.build import BuiltModel

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import Tokenizer


class Totals(NamedTuple):
    """Sums over some tokens."""

    tokens: int
    nats: float
    num_bytes: int  # of the text that the tokens stand for
    likeliest: int  # tokens that the model held most probable

    def as_json(self) -> dict[str, Any]:
        """Means: nats a token, bits a byte, and the share of tokens that were the most likely ones.

        They are None where there is nothing that they are of.
        """
        return {
            "tokens": self.tokens,
            "loss": self.nats / self.tokens if self.tokens else None,
            "bits_per_byte": self.nats / math.log(2) / self.num_bytes if self.num_bytes else None,
            "accuracy": self.likeliest / self.tokens if self.tokens else None,
        }


class Sizes:
    """How many bytes of text ids stand for; the end of a document stands for none."""

    def __init__(self, tokenizer: Tokenizer, eos_id: int) -> None:
        self._tokenizer, self._eos_id = tokenizer, eos_id
        self._lengths = byte_lengths(tokenizer)

    def of(self, ids: np.ndarray) -> int:
        ids = ids[ids != self._eos_id]
        if self._lengths is None:  # not spelled in bytes: of the text as it is decoded
            return len(self._tokenizer.decode(ids.tolist(), skip_special_tokens=False).encode())
        return int(self._lengths[ids].sum())


# ---------------------------------------------------------------------------------------------- text


def corpora(blends: Sequence[Path]) -> dict[str, list[Path]]:
    """The test shards of each corpus of some blends, by its name; without empty ones."""
    found: dict[str, list[Path]] = {}
    for blend in blends:
        for shard in (read_json(blend)["test"] or {}).get("shards", []):
            prefix = Path(shard["prefix"])
            if shard["tokens"] and prefix not in found.setdefault(shard["corpus"], []):
                found[shard["corpus"]].append(prefix)
    return {corpus: shards for corpus, shards in sorted(found.items()) if shards}


def windows(shards: Sequence[Path], eos_id: int, seq_length: int, most: int) -> Iterator[np.ndarray]:
    """Documents of a corpus up to `most` tokens, in windows of at most `seq_length` + 1 tokens.

    The first token of each window is not scored: it is the end of a document before the first window, and the
    last token of the window before it elsewhere. So each token of a document is scored once.
    """
    left = most
    for shard in shards:
        documents = IndexedDataset(str(shard))
        for number in range(len(documents)):
            text = np.concatenate([[eos_id], documents[number]])[: left + 1]
            for start in range(0, len(text) - 1, seq_length):
                yield text[start : start + seq_length + 1]
            left -= len(text) - 1
            if left <= 0:
                return


def text_losses(
    built: BuiltModel, shards: Sequence[Path], sizes: Sizes, eos_id: int, most: int, batch_size: int
) -> dict[str, Any]:
    """The loss of a corpus' test split, of up to `most` tokens."""
    texts = list(windows(shards, eos_id, built.settings.seq_length, most))
    scores = score(built, [text.tolist() for text in texts], batch_size=batch_size)
    return _totals(scores, [np.ones(len(text) - 1, dtype=bool) for text in texts], texts, sizes).as_json()


def _totals(
    scores: Sequence[Scores], masks: Sequence[np.ndarray], texts: Sequence[np.ndarray], sizes: Sizes
) -> Totals:
    """Sums over the tokens of texts that a mask (tokens - 1) picks."""
    return Totals(
        tokens=sum(int(mask.sum()) for mask in masks),
        nats=sum(float(s.nats[m].sum(dtype=np.float64)) for s, m in zip(scores, masks, strict=True)),
        num_bytes=sum(sizes.of(text[1:][mask]) for text, mask in zip(texts, masks, strict=True)),
        likeliest=sum(int(s.likeliest[m].sum()) for s, m in zip(scores, masks, strict=True)),
    )


# --------------------------------------------------------------------------------------------- chats


def held_out_sources(blend: Path) -> list[Source]:
    """The sources of chats that have packs in the test split."""
    return [source for source in check_packed_blend(blend).splits["test"] if source.files]


class Conversation(NamedTuple):
    """A sequence of a pack, and which of its tokens were said by the assistant: both (tokens,)."""

    ids: np.ndarray
    said: np.ndarray

    def answers(self) -> Iterator[tuple[list[int], list[int]]]:
        """What was there before each answer, and the answer with the token that ends it."""
        edges = np.flatnonzero(np.diff(self.said, prepend=False, append=False))
        for start, end in edges.reshape(-1, 2):
            yield self.ids[:start].tolist(), self.ids[start:end].tolist()


def conversations(files: Sequence[Path], most_packs: int | None = None) -> Iterator[Conversation]:
    """The conversations of packs that hold at least one answer."""
    packs = PackedDataset(files, {})
    for number in range(len(packs) if most_packs is None else min(most_packs, len(packs))):
        yield from of_pack(packs[number])


def of_pack(pack: Pack) -> Iterator[Conversation]:
    """The conversations of a pack that hold at least one answer."""
    starts = [*map(int, pack.seq_start_id), len(pack.input_ids)]
    for start, end in itertools.pairwise(starts):
        mask = np.asarray(pack.loss_mask[start:end]) > 0  # that of the label, which is one further
        said = np.concatenate([[False], mask[:-1]])
        if said.any():
            yield Conversation(np.asarray(pack.input_ids[start:end]), said)


def chat_losses(
    built: BuiltModel, files: Sequence[Path], sizes: Sizes, most_packs: int, batch_size: int
) -> dict[str, Any]:
    """The loss of what the assistant said in a source's test split, each conversation by itself."""
    found = list(conversations(files, most_packs))
    scores = score(built, [one.ids.tolist() for one in found], batch_size=batch_size)
    return _totals(scores, [one.said[1:] for one in found], [one.ids for one in found], sizes).as_json()


def exact_answers(
    built: BuiltModel,
    files: Sequence[Path],
    tokenizer: Tokenizer,
    most: int,
    max_tokens: int,
    batch_size: int,
) -> dict[str, Any]:
    """How many of the first answers of a source's test split the model gives to the letter, greedily.

    Answers that call functions are counted apart from the others. An answer that is longer than `max_tokens`
    is cut, and counts as wrong.
    """
    asked: list[tuple[list[int], list[int]]] = []
    for conversation in conversations(files):
        asked += conversation.answers()
        if len(asked) >= most:
            break
    asked = asked[:most]
    ends = sorted({reference[-1] for _, reference in asked})
    given = generate(
        built, [prompt for prompt, _ in asked], stop=ends, max_tokens=max_tokens, batch_size=batch_size
    )
    kinds = ["calls" if CALL in tokenizer.decode(r, skip_special_tokens=False) else "texts" for _, r in asked]
    result: dict[str, Any] = {}
    for kind in sorted(set(kinds)):
        of_kind = [number for number, its in enumerate(kinds) if its == kind]
        exact = sum(given[number] == asked[number][1] for number in of_kind)
        cut = sum(finish_reason(given[number], ends) == "length" for number in of_kind)
        counts = {"asked": len(of_kind), "exact": exact, "cut": cut}
        result[kind] = counts | {"share": exact / len(of_kind)}
    return result
