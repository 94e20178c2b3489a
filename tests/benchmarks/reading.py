"""How many samples a second random access gives, from packed chats and from tokenized text.

    python tests/benchmarks/reading.py [--packs 20000]

Packs of 4096 tokens are read from files of one row group for every so many tokens, in a random order. The
pattern that Megatron-Bridge reads with keeps one row group, of 1000 packs. Tokenized text is read by
megatron-core's IndexedDataset: by its memory map, and by opening the file for every sample. The files lie in
the page cache, so what is measured is the work of the processor.
"""

from __future__ import annotations

import argparse
import bisect
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import snaketron.model.backend  # noqa: F401 (prepares megatron-core for this machine)
from snaketron.data.chats import packs

import numpy as np
import pyarrow.parquet as pq
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, _IndexWriter

PACK_SIZE = 4096
METADATA = {"pack_size": PACK_SIZE}


class BridgeReader:
    """Megatron-Bridge's pattern: row -> (row group, row in it) by bisection, and one row group is kept."""

    def __init__(self, path: Path) -> None:
        self.file = pq.ParquetFile(path)
        footer = self.file.metadata
        sizes = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
        self.first_rows = np.cumsum([0, *sizes]).tolist()
        self.kept: int | None = None

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        group = bisect.bisect_right(self.first_rows, index) - 1
        if group != self.kept:
            self.table = self.file.read_row_group(group, columns=packs.SCHEMA.names)
            self.kept = group
        row = index - self.first_rows[group]
        ids, mask, starts = (self.table.column(name)[row].values.to_numpy() for name in packs.SCHEMA.names)
        return ids, mask, starts


def text_ids(count: int) -> np.ndarray:
    """Ids of a vocabulary of 32 000, as often as words are."""
    return (32_000 * np.random.default_rng(0).random(count) ** 4).astype(np.int32)


def made_packs(count: int) -> Iterator[packs.Pack]:
    draw = np.random.default_rng(1)
    ids = text_ids(count * PACK_SIZE).reshape(count, PACK_SIZE)
    for row in ids:
        starts = np.unique(np.concatenate([[0], draw.integers(1, PACK_SIZE, 5)])).astype(np.int32)
        mask = np.repeat(draw.random(PACK_SIZE // 64) < 0.6, 64).astype(np.uint8)
        yield packs.Pack(row, mask, starts)


def rate(read: Callable[[int], object], indices: Sequence[int], most_seconds: float = 5.0) -> float:
    """Samples a second, of as many as can be read in some seconds."""
    begin = time.perf_counter()
    done, took = 0, 0.0
    while done < len(indices) and took < most_seconds:
        read(indices[done])
        done += 1
        took = time.perf_counter() - begin
    return done / took


def packed_chats(directory: Path, count: int) -> None:
    """A line of the table for each size of the row groups and each reader."""
    order = np.random.default_rng(2).permutation(count).tolist()
    made = list(made_packs(count))
    print(f"{count} packs of {PACK_SIZE} tokens; a row group of ours has {packs.ROW_GROUP_TOKENS} tokens")
    print(f"{'row group':>12} {'MB':>6} {'write s':>8} {'open ms':>8}", end="")
    print(f" {'reader':>28} {'samples/s':>10} {'ratio':>6}")
    ours = packs.ROW_GROUP_TOKENS
    bridge = 0.0
    for tokens in (1000 * PACK_SIZE, 65_536, ours, PACK_SIZE):
        path = directory / f"{tokens}.parquet"
        packs.ROW_GROUP_TOKENS = tokens
        begin = time.perf_counter()
        packs.write(path, made, METADATA)
        wrote = time.perf_counter() - begin
        begin = time.perf_counter()
        uncached = packs.PackedDataset([path], METADATA, cache_bytes=1)
        opened = time.perf_counter() - begin
        rates = {} if bridge else {"Megatron-Bridge's pattern": rate(BridgeReader(path).__getitem__, order)}
        rates["PackedDataset, none kept"] = rate(uncached.__getitem__, order)
        if tokens == ours:
            some, whole = (packs.PackedDataset([path], METADATA, cache_bytes=n) for n in (1 << 28, 1 << 40))
            rates["PackedDataset, 256 MB kept"] = rate(some.__getitem__, order * 2, 60)
            for index in order:
                whole[index]
            rates["PackedDataset, all kept"] = rate(whole.__getitem__, order)
        for reader, samples in rates.items():
            bridge = bridge or samples
            size = path.stat().st_size / 1e6
            print(f"{tokens // PACK_SIZE:>6} packs {size:>6.0f} {wrote:>8.2f} {1000 * opened:>8.1f}", end="")
            print(f" {reader:>28} {samples:>10.0f} {samples / bridge:>5.0f}x", flush=True)
    packs.ROW_GROUP_TOKENS = ours


def tokenized_text(directory: Path, num_tokens: int) -> None:
    """Documents of about 700 tokens in a .bin/.idx pair."""
    prefix = directory / "text"
    lengths = np.random.default_rng(3).lognormal(6, 1, num_tokens // 700).astype(np.int32) + 1
    text_ids(int(lengths.sum())).astype(np.uint16).tofile(f"{prefix}.bin")
    with _IndexWriter(f"{prefix}.idx", DType.dtype_from_code(8)) as index:
        index.write(lengths.tolist(), None, list(range(len(lengths) + 1)))
    order = np.random.default_rng(4).permutation(len(lengths)).tolist()
    print(f"\n{len(lengths)} documents, {int(lengths.sum())} tokens in .bin and .idx")
    print(f"{'reader':>44} {'samples/s':>10} {'ratio':>7}")
    base = rate(IndexedDataset(str(prefix), mmap=False).__getitem__, order)
    print(f"{'IndexedDataset, open, seek and read':>44} {base:>10.0f} {'1x':>7}")
    mapped = rate(IndexedDataset(str(prefix), mmap=True).__getitem__, order)
    print(f"{'IndexedDataset, memory map':>44} {mapped:>10.0f} {mapped / base:>6.1f}x")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--packs", type=int, default=20_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        packed_chats(Path(directory), args.packs)
        tokenized_text(Path(directory), args.packs * PACK_SIZE)


if __name__ == "__main__":
    main()
