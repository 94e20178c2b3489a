"""What data jobs take that may take long: reading large files, and the sample index of a long phase."""

from __future__ import annotations

from collections.abc import Mapping

# Bytes of text a second on one CPU, half of what was measured, by the rule that reads them.
READING = {"tokenize_shard": 60e6, "render_chat": 2.5e6}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".parquet")
_TEXT = 3  # bytes of text in a compressed byte

_LIBRARIES = 1e9  # bytes
_SAMPLE_BYTES = 18  # while shards are blended: 16, measured with 100 million samples
_SAMPLE = 60e-9  # seconds
_COMPARISON = 1e-9  # seconds; megatron-core compares all shards for each sample
_TOKEN = 60e-12  # seconds: a document of a thousand tokens is shuffled and numbered in 60 ns


def reading_seconds(rule: str, files: Mapping[str, int]) -> float:
    """Time to read files of these sizes, by name; 0 for rules that read no raw files."""
    text = sum(size * (_TEXT if name.lower().endswith(_COMPRESSED) else 1) for name, size in files.items())
    return text / READING[rule] if rule in READING else 0.0


def index_bytes(samples: int) -> float:
    """Memory to index a phase of so many samples."""
    return _LIBRARIES + _SAMPLE_BYTES * samples


def index_seconds(samples: int, seq_length: int, shards: int) -> float:
    """Time to index a phase that blends so many shards, on one CPU."""
    return samples * (_SAMPLE + shards * _COMPARISON + seq_length * _TOKEN)
