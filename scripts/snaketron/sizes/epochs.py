"""How often a phase goes through its text, and what of that a longer phase shares with it.

The numbers stand in blend.json, so that the blend of a phase of another length is known without making it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any


def taken(share: float, tokens: int, train_tokens: int) -> tuple[int, float]:
    """Tokens that a phase of `train_tokens` takes of a corpus, and how often it sees each of them.

    Args:
        share: of the samples of the phase.
        tokens: that the corpus has.
        train_tokens: of the phase.
    """
    return round(share * train_tokens), round(share * train_tokens / tokens, 4)


def resized(blend: Mapping[str, Any], train_tokens: int) -> dict[str, Any]:
    """The content of blend.json for a phase of another length."""
    made = copy.deepcopy(dict(blend)) | {"train_tokens": train_tokens}
    for corpus in made["train"]["corpora"]:
        corpus["taken"], corpus["epochs"] = taken(corpus["share"], corpus["tokens"], train_tokens)
    return made


def shares(weights: list[float], samples: int) -> Iterator[int]:
    """The most samples that the first `samples` of a blend take from each of its shards.

    megatron-core takes each sample from the shard that lags most behind its weight, so none is taken more
    often than its share rounded up.
    """
    total = sum(weights)
    for weight in weights:
        yield math.ceil(samples * (weight / total))


def epochs(samples: int, seq_length: int, tokens: int) -> int:
    """How often a shard of `tokens` is read for so many samples; the last one also needs a label after it."""
    return max(1, -(-(samples * seq_length + 1) // tokens))
