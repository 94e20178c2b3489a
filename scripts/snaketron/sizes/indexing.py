"""What the job takes that builds the sample index of a phase: seconds, or hours for 20 T tokens."""

from __future__ import annotations

_LIBRARIES = 1e9  # bytes
_SAMPLE_BYTES = 18  # while shards are blended: 16, measured with 100 million samples
_SAMPLE = 60e-9  # seconds
_COMPARISON = 1e-9  # seconds; megatron-core compares all shards for each sample
_TOKEN = 60e-12  # seconds: a document of a thousand tokens is shuffled and numbered in 60 ns


def index_bytes(samples: int) -> float:
    """Memory to index a phase of so many samples."""
    return _LIBRARIES + _SAMPLE_BYTES * samples


def index_seconds(samples: int, seq_length: int, shards: int) -> float:
    """Time to index a phase that blends so many shards, on one CPU."""
    return samples * (_SAMPLE + shards * _COMPARISON + seq_length * _TOKEN)
