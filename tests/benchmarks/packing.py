"""How long packing takes, how full the packs are, and how much memory it needs.

    python tests/benchmarks/packing.py                   # the algorithms, on lengths
    python tests/benchmarks/packing.py --gigabytes 10    # rule pack_sft, on files of rendered chats

The lengths are lognormal, as those of chats are: half of them below 500 tokens, 5 % above 3000; what is below
16 tokens or longer than a pack is left out. The plain first fit is what the recipe does: for every
conversation a scan over all packs, in Python.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from snaketron.config.data import SPLITS, Packing
from snaketron.data import arrow
from snaketron.data.chats import packing, render, sequences
from snaketron.lineage.record import FOOTER
from snaketron.settings.chats import PackSettings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SEED = 1234
REPOSITORY = Path(__file__).parents[2]


def chat_lengths(count: int, pack_size: int, seed: int = SEED) -> np.ndarray:
    """Tokens of `count` conversations."""
    lengths = np.random.default_rng(seed).lognormal(np.log(500), 1.1, 2 * count).astype(np.int64)
    return lengths[(lengths >= 16) & (lengths <= pack_size)][:count]


def plain_first_fit(lengths: list[int], pack_size: int) -> int:
    """How many packs a scan over every pack needs."""
    rooms: list[int] = []
    for length in lengths:
        for i, room in enumerate(rooms):
            if room >= length:
                rooms[i] = room - length
                break
        else:
            rooms.append(pack_size - length)
    return len(rooms)


def seconds(function: Callable[[], Any], repeat: int = 3) -> tuple[float, Any]:
    """The least of some times on the processor, and what the function returned."""
    best = float("inf")
    for _ in range(repeat):
        begin = time.process_time()
        result = function()
        best = min(best, time.process_time() - begin)
    return best, result


def algorithms(count: int, pack_size: int, *, plain: bool) -> None:
    """Lines of the table: each algorithm, and, where asked for, the plain first fit in the same order."""
    lengths = chat_lengths(count, pack_size)
    orders = {
        "first_fit_decreasing": np.sort(lengths)[::-1],
        "first_fit_shuffle": lengths[np.random.default_rng(SEED).permutation(count)],
    }
    for algorithm in get_args(Packing):
        took, bins = seconds(partial(packing.pack, lengths, pack_size, algorithm, SEED))
        line(
            count,
            pack_size,
            algorithm,
            took,
            f"{len(bins):>8} {lengths.sum() / (len(bins) * pack_size):8.2%}",
        )
        if plain and algorithm in orders:
            slow, num_bins = seconds(partial(plain_first_fit, orders[algorithm].tolist(), pack_size), 1)
            full = lengths.sum() / (num_bins * pack_size)
            name = f"the same, a plain scan ({slow / took:.0f}x)"
            line(count, pack_size, name, slow, f"{num_bins:>8} {full:8.2%}")


def line(count: int, pack_size: int, name: str, took: float, rest: str) -> None:
    print(f"{count:>10} {pack_size:>10} {name:>32} {took:>9.3f} {rest}", flush=True)


def write_chats(path: Path, num_tokens: int, seed: int) -> None:
    """A file of rendered chats with random ids, about as compressible as text."""
    draw = np.random.default_rng(seed)
    lengths = chat_lengths(2 * num_tokens // 700, 4096, seed)
    lengths = lengths[: np.searchsorted(np.cumsum(lengths), num_tokens)]
    schema = sequences.SCHEMA.with_metadata(
        {FOOTER: json.dumps({"source": "made", "tokenizer_sha256": "t", "template_sha256": "c"}).encode()}
    )
    with pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=["file", "split"]) as writer:
        for group in np.array_split(lengths, max(1, num_tokens // render.ROW_GROUP_TOKENS)):
            writer.write_table(_rendered(group, draw, schema))


def _rendered(lengths: np.ndarray, draw: np.random.Generator, schema: pa.Schema) -> pa.Table:
    offsets = arrow.number_array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    total = int(lengths.sum())
    ids = (32_000 * draw.random(total) ** 4).astype(np.int32)
    mask = np.repeat(draw.random(total // 50 + 1) < 0.6, 50)[:total]
    splits = arrow.number_array(draw.choice(3, len(lengths), p=[0.94, 0.04, 0.02]), pa.int8())
    columns = [
        pa.ListArray.from_arrays(offsets, arrow.number_array(ids, pa.int32())),
        pa.ListArray.from_arrays(offsets, arrow.number_array(mask, pa.uint8())),
        arrow.string_array(["raw.jsonl"] * len(lengths)),
        arrow.number_array(np.arange(len(lengths)), pa.int64()),
        arrow.number_array(np.zeros(len(lengths)), pa.int32()),
        pa.DictionaryArray.from_arrays(splits, arrow.string_array(SPLITS)),
        pa.DictionaryArray.from_arrays(
            arrow.number_array(np.zeros(len(lengths)), pa.int8()), arrow.string_array(["none"])
        ),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def files(gigabytes: float, num_files: int = 8) -> None:
    """pack_sft on chats of 5 bytes a token, in one file and in all of them."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        chats = [root / f"chat/part_{i}.parquet" for i in range(num_files)]
        chats[0].parent.mkdir()
        for i, path in enumerate(chats):
            write_chats(path, int(gigabytes * 1e9 / 5 / num_files), seed=i)
        print(
            f"{'files':>6} {'GB':>6} {'decoded':>8} {'seconds':>8} {'Mtok/s':>7} {'peak GB':>8} {'full':>8}"
        )
        for used in (chats[:1], chats):
            begin = time.perf_counter()
            peak = pack(used, root)
            took = time.perf_counter() - begin
            counts = json.loads((root / "sft/all.json").read_text())["counts"]["splits"]
            tokens = sum(split["tokens"] for split in counts.values())
            size, rate = sum(path.stat().st_size for path in used) / 1e9, tokens / took / 1e6
            print(f"{len(used):>6} {size:>6.2f} {tokens * 5 / 1e9:>8.2f} {took:>8.1f} {rate:>7.1f}", end=" ")
            print(f"{peak:>8.2f} {counts['train']['efficiency']:>8.2%}", flush=True)


def pack(chats: Sequence[Path], root: Path) -> float:
    """Run pack_sft as a process of its own; returns the most gigabytes that it had."""
    code = (
        "import resource, sys, pack_sft; pack_sft.main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    outputs = [f"--{split}={root}/sft/{split}.parquet" for split in SPLITS]
    settings = PackSettings(pack_size=4096, algorithm="first_fit_decreasing").model_dump_json()
    options = [f"--settings={settings}", f"--record={root}/sft/all.json"]
    done = subprocess.run(
        [sys.executable, "-c", code, "--chats", *map(str, chats), *options, *outputs],
        cwd=REPOSITORY / "scripts",
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return int(done.stdout) * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, help="decoded size of the chats to pack")
    args = parser.parse_args()
    if args.gigabytes is not None:
        return files(args.gigabytes)
    print(f"{'sequences':>10} {'pack size':>10} {'algorithm':>32} {'CPU s':>9} {'packs':>8} {'full':>8}")
    for count, pack_size in ((1_000_000, 4096), (1_000_000, 262_144), (20_000, 4096)):
        algorithms(count, pack_size, plain=count <= 20_000)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
