"""The order in which the samples of several sources are trained on."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

_WEIGHT_BITS = 32  # weights are rounded to multiples of 2**-32 of their sum, and then exact


def mix(
    sizes: Sequence[int], weights: Sequence[float], num_samples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """For each of `num_samples` samples, its source (int32) and its index in the source (int64).

    After any number of samples, each source has had its share of them to within one sample. A source is
    walked in a new order each epoch, every sample once. Nothing but the arguments matters, and a larger
    `num_samples` only adds samples at the end, so a resumed run sees the samples it would have seen.
    """
    if len(sizes) != len(weights) or not sizes:
        raise ValueError(f"{len(sizes)} sizes and {len(weights)} weights; one of each a source is needed")
    if any(size < 1 for size in sizes) or any(not weight > 0 for weight in weights):
        raise ValueError(f"sizes and weights must be positive: {list(sizes)}, {list(weights)}")
    source_index = interleave(weights, num_samples)
    sample_index = np.empty(num_samples, dtype=np.int64)
    for source, size in enumerate(sizes):
        places = np.flatnonzero(source_index == source)
        sample_index[places] = walk(size, len(places), source, seed)
    return source_index, sample_index


def interleave(weights: Sequence[float], num_samples: int) -> np.ndarray:
    """A source for each sample, so that every prefix holds every source's share to within one sample.

    With the share w, the source's j-th sample may come from floor(j/w) on and must come before
    ceil((j+1)/w). Taking the most urgent sample that may come keeps all of these deadlines (earliest
    deadline first is optimal on one processor); taking the source that lags most does not, from three
    sources on.
    """
    total_weight = sum(weights)
    shares = [max(1, round(weight / total_weight * 2**_WEIGHT_BITS)) for weight in weights]
    total = sum(shares)
    waiting = [(0, source, 0) for source in range(len(shares))]  # (first place, source, count), by place
    ready: list[tuple[int, int, int]] = []  # (deadline, source, count), by deadline
    sources = np.empty(num_samples, dtype=np.int32)
    for place in range(num_samples):
        while waiting and waiting[0][0] <= place:
            _, source, count = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(count + 1) * total // shares[source]), source, count))
        _, source, count = heapq.heappop(ready)
        sources[place] = source
        heapq.heappush(waiting, ((count + 1) * total // shares[source], source, count + 1))
    return sources


def walk(size: int, num_samples: int, source: int, seed: int) -> np.ndarray:
    """The first `num_samples` indices of a source: a fresh permutation each epoch."""
    num_epochs = -(-num_samples // size)
    orders = [
        np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(source, epoch))).permutation(size)
        for epoch in range(num_epochs)
    ]
    return np.concatenate([np.empty(0, dtype=np.int64), *orders])[:num_samples]
