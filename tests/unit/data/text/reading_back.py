"""What a tokenized shard holds, as Megatron reads it."""

from __future__ import annotations

from pathlib import Path

from snaketron.data.tokenizer import load_tokenizer

import pyarrow.parquet as pq

TEXTS = [f"document {i}: the quick brown fox {'jumps ' * i}" for i in range(40)]


def sequences(record: Path, split: str) -> list[list[int]]:
    """What Megatron reads of a split."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset  # 3 s, for the tests that read

    prefix = record.parent / split / record.stem
    if not prefix.with_suffix(".bin").stat().st_size:
        return []
    return [[int(i) for i in sequence] for sequence in IndexedDataset(str(prefix))]


def texts_of(record: Path, tokenizer_dir: Path, split: str = "train") -> list[str]:
    tokenizer = load_tokenizer(tokenizer_dir)
    return [tokenizer.decode(ids[:-1]) for ids in sequences(record, split)]


def table_of(record: Path) -> list[dict]:
    return pq.read_table(record.with_suffix(".parquet")).to_pylist()


def ids_of(tokenizer_dir: Path, text: str) -> list[int]:
    return load_tokenizer(tokenizer_dir).encode(text).ids
