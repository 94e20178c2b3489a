"""How probable a model holds given texts: the loss of each token, and whether it was the most likely one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from snaketron.inference.decoder import Decoder, decoding
from snaketron.model import backend
from snaketron.model.build import BuiltModel

import numpy as np
import torch
from torch import Tensor

CHUNK = 256  # tokens that are read at once: logits of a large vocabulary take 0.5 MB for each token of a row


class Scores(NamedTuple):
    """A text token by token, without its first one, which nothing predicts; both (tokens - 1,)."""

    nats: np.ndarray  # minus the logarithm of the probability
    likeliest: np.ndarray  # whether no other token was more probable


def score(built: BuiltModel, texts: Sequence[Sequence[int]], *, batch_size: int = 8) -> list[Scores]:
    """The scores of texts of at least two tokens. Every rank must call this; all get the same ones.

    Texts of like lengths are read together, `batch_size` at a time, in pieces of `CHUNK` tokens.
    """
    found: list[Scores | None] = [None] * len(texts)
    order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        for number, scores in zip(rows, _together(built, [texts[n] for n in rows]), strict=True):
            found[number] = scores
    return [scores for scores in found if scores is not None]


def _together(built: BuiltModel, texts: Sequence[Sequence[int]]) -> Iterator[Scores]:
    """The scores of texts, the longest first; what fills up the shorter ones comes after them."""
    length = len(texts[0])
    ids = torch.zeros(len(texts), length, dtype=torch.int64, device=backend.device())
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
    nats, likeliest = [], []
    with decoding(built, len(texts), length) as decoder:
        for start in range(0, length - 1, CHUNK):
            part = ids[:, start : min(start + CHUNK, length - 1)]
            targets = ids[:, start + 1 : start + 1 + part.shape[1]]
            both = _scores(decoder, part, targets)
            nats.append(both[0])
            likeliest.append(both[1])
    all_nats, all_likeliest = torch.cat(nats, 1).cpu().numpy(), torch.cat(likeliest, 1).cpu().numpy()
    for row, text in enumerate(texts):
        yield Scores(all_nats[row, : len(text) - 1], all_likeliest[row, : len(text) - 1] > 0)


def _scores(decoder: Decoder, ids: Tensor, targets: Tensor) -> Tensor:
    """(2, rows, tokens): losses, and 1 where the target is the most likely token; the same on all ranks."""
    logits = decoder.read_all(ids)
    both = torch.zeros(2, *ids.shape, device=ids.device)
    if logits is not None:
        # Rows: over another axis PyTorch adds up one number after the other on a CPU.
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        both[0] = nats.view(targets.shape)
        both[1] = logits.argmax(-1) == targets
    if torch.distributed.get_world_size() > 1:  # the last rank is in the last pipeline stage
        torch.distributed.broadcast(both, src=torch.distributed.get_world_size() - 1)
    return both
