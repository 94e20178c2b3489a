"""How long `scripts/lineage.py` takes in a directory of ten thousand shards.

    python tests/benchmarks/lineage.py                     # makes the directory, asks, and deletes it
    python tests/benchmarks/lineage.py --shards 100000 --keep /scratch/lineage

Each shard has a raw file and the seven files that rule tokenize_shard writes, all of them small: the times
are those of records and files, and not of reading text. The index has the arrays of every shard.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from snaketron.files import sha256, sha256_of, to_json
from snaketron.lineage.record import Entry, Record

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

SCRIPT = Path(__file__).parents[2] / "scripts/lineage.py"
VERSIONS = {"python": "3.12", "snaketron": "0.1.0", "megatron-core": "0.19.2"}
STEPS, BATCH = 100, 512


def write(path: str, content: bytes) -> Entry:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return Entry(file.name, path, sha256(file), len(content), file.stat().st_mtime_ns)


def record(kind: str, name: str, path: str, inputs: list[Entry], outputs: list[Entry], **more) -> Entry:
    values = {"settings": {}, "counts": {}, "versions": VERSIONS} | more
    made = Record(
        kind=kind,
        name=name,
        created="2026-11-28T12:00:00+00:00",
        seconds=1.0,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        **values,
    )
    return write(path, to_json(made.as_json()))


def make_shard(number: int, tokenizer: Entry) -> Entry:
    """A shard of one raw file with two documents; returns its record."""
    name, root = f"part_{number:06d}", "data/tokens/web"
    raw = write(f"raw/web/{name}.jsonl", b'{"text": "%d"}\n{"text": "again %d"}\n' % (number, number))
    outputs = []
    for split in ("train", "valid", "test"):
        for end in ("bin", "idx"):
            entry = write(f"{root}/{split}/{name}.{end}", f"{split} {end} {number}".encode())
            outputs.append(entry.renamed(f"{split}.{end}"))
    table = pa.table({"split": ["train"] * 2, "sequence": [0, 1], "file": [raw.path] * 2, "row": [1, 2]})
    pq.write_table(table, f"{root}/{name}.parquet")
    documents = Entry("documents", f"{root}/{name}.parquet", sha256(Path(f"{root}/{name}.parquet")))
    inputs = [raw.renamed("text"), tokenizer]
    settings = {"corpus": "web", "text_field": "text", "max_line_bytes": 1000}
    return record(
        "tokens", f"web/{name}", f"{root}/{name}.json", inputs, [*outputs, documents], settings=settings
    )


def make_index(num_shards: int) -> None:
    """megatron-core's files: each shard has a sample of its first document, and one of both."""
    directory = Path("data/pretrain/one/index")
    directory.mkdir(parents=True)
    arrays = {
        "document_index": np.array([0, 1], np.int32),
        "sample_index": np.array([[0, 0], [0, 4], [1, 2]], np.int32),
        "shuffle_index": np.array([1, 0], np.uint32),
    }
    for number in range(num_shards):
        key = sha256_of(number)[:32]
        prefix = f"data/tokens/web/train/part_{number:06d}"
        name = f"{key}-GPTDataset-train-"
        (directory / f"{name}description.txt").write_bytes(to_json({"dataset_path": prefix}))
        for what, array in arrays.items():
            np.save(directory / f"{name}{what}.npy", array)
    shards = [{"dataset_path": f"data/tokens/web/train/part_{n:06d}"} for n in range(num_shards)]
    (directory / "b-BlendedDataset-train-description.txt").write_bytes(to_json({"datasets": shards}))
    samples = np.arange(STEPS * BATCH)
    np.save(directory / "b-BlendedDataset-train-dataset_index.npy", (samples % num_shards).astype(np.int16))
    np.save(directory / "b-BlendedDataset-train-dataset_sample_index.npy", samples // num_shards % 2)


def make(num_shards: int) -> None:
    """The records and files of a workflow, in the current directory."""
    tokenizer = write("data/tokenizer/tokenizer.json", b"{}").renamed("tokenizer")
    record("tokenizer", "tokenizer", "data/tokenizer/record.json", [], [tokenizer])
    shards = [make_shard(number, tokenizer) for number in range(num_shards)]
    blend = write("data/pretrain/one/blend.json", b"{}").renamed("blend.json")
    inputs = [*(shard.renamed("records") for shard in shards), tokenizer]
    record("blend", "one", "data/pretrain/one/record.json", inputs, [blend])
    make_index(num_shards)
    settings = {"seed": 1, "seq_length": 4, "train_samples": STEPS * BATCH}
    index = Entry("index", "data/pretrain/one/index", "d1")
    record(
        "index", "one", "data/pretrain/one/index.json", [blend.renamed("blend")], [index], settings=settings
    )
    for key, rate in (("0a", 1e-3), ("0b", 1e-4)):
        place = f"ckpt/versions/pretrain_one-{key}"
        weights = write(f"{place}/iter_0000100/weights", key.encode())
        settings = {"seed": 1, "seq_length": 4, "train_iters": STEPS, "global_batch_size": BATCH}
        settings["optimizer"] = {"learning_rate": rate}
        inputs = [blend.renamed("blend"), tokenizer]
        record(
            "checkpoint",
            "pretrain/one",
            f"{place}/record.json",
            inputs,
            [weights],
            settings=settings,
            key=key,
        )


QUESTIONS = (
    ("nothing (the start of Python)", "--help"),
    ("the tree", "ckpt/versions/pretrain_one-0a"),
    ("the tree as JSON", "ckpt/versions/pretrain_one-0a", "--format", "json"),
    ("its files, each read", "ckpt/versions/pretrain_one-0a", "--verify"),
    ("its files, unchanged", "ckpt/versions/pretrain_one-0a", "--verify"),
    ("who uses a file", "--who-uses", "raw/web/part_000007.jsonl"),
    ("when a document was trained on", "--who-uses", "raw/web/part_000007.jsonl", "--row", "2"),
    ("what to make again without it", "--without", "raw/web/part_000007.jsonl", "--row", "2"),
    ("why two trainings differ", "--diff", "ckpt/versions/pretrain_one-0a", "ckpt/versions/pretrain_one-0b"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--keep", type=Path, help="make it there, and leave it")
    args = parser.parse_args()
    directory = args.keep or Path(tempfile.mkdtemp())
    directory.mkdir(parents=True, exist_ok=True)
    os.chdir(directory)
    began = time.monotonic()
    if not Path("ckpt").exists():
        make(args.shards)
    print(f"{args.shards:,} shards made in {time.monotonic() - began:.0f} s")
    for what, *question in QUESTIONS:
        began = time.monotonic()
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, SCRIPT, *question], capture_output=True, text=True)
        told = (done.stdout or done.stderr).strip().splitlines()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(
            f"{time.monotonic() - began:6.1f} s, {cpu:.1f} of a CPU  {what}: {told[-1] if told else ''}"[:150]
        )
    if not args.keep:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
