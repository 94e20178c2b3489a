"""Tuning on packs against tuning on padded conversations, at the same tokens trained; and waiting for data.

    python -m tests.benchmarks.sft_training                     # the default model, on the CPU or a GPU
    python -m tests.benchmarks.sft_training --pack-size 4096
    python -m tests.benchmarks.sft_training --model large --pack-size 16384 --packs 24  # of gpu_training
    python -m tests.benchmarks.sft_training --model nano --pack-size 8192 --packs 40 --lora

The same conversations, of lognormal lengths as in `packing`, are trained in packs; on a GPU in packs that are
recorded; and in batches of as many as fill a pack on average, each padded to the longest of its batch. The
second half of each is the answer. Steps have one micro-batch. The first of each way is not counted, nor are
those of the first round of recorded packs, which record.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import snaketron.model  # noqa: F401  before megatron
from snaketron.config import load
from snaketron.data.chats import packing
from snaketron.data.chats.packs import Pack, join, loss_weights, write
from snaketron.data.tokenizer import Info
from snaketron.files import write_json
from snaketron.model import backend
from snaketron.model.distributed import distributed
from snaketron.settings.training import run_settings, train_settings
from snaketron.train import loop
from snaketron.train.batches import Batches
from snaketron.train.build import build_training
from snaketron.train.losses import Batch, Counts, Report
from snaketron.train.sft_batches import SftBatches

import numpy as np
import torch
from tests.benchmarks import shapes
from tests.benchmarks.packing import chat_lengths

VOCABULARY = 2048  # that the tokens are of
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "tiny": ({}, VOCABULARY),
    "large": (shapes.MODEL, shapes.VOCABULARY),
    "nano": (shapes.NANO, shapes.VOCABULARY),
    "super": (shapes.SUPER, shapes.VOCABULARY),
}


class PaddedBatches(Batches):
    """Conversations, so many a micro-batch, padded to the longest of it."""

    sources = ("made",)

    def __init__(
        self, conversations: Sequence[tuple[np.ndarray, np.ndarray]], count: int, depths: int
    ) -> None:
        super().__init__(1)
        self.conversations, self.count, self.depths = conversations, count, depths

    def micro_batches(self, split: str, first: int, count: int) -> Iterator[Batch]:
        packs = [join([c]) for c in self.conversations[first * self.count : (first + 1) * self.count]]
        if not packs:
            return  # of a step that is read ahead and not trained
        length = -(-max(len(pack.input_ids) for pack in packs) // 16) * 16
        shape = (len(packs), length)
        ids, labels = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        weights = np.zeros((1 + self.depths, *shape), np.float32)
        padding = np.ones(shape, bool)
        for row, pack in enumerate(packs):
            n = len(pack.input_ids)
            ids[row, :n], labels[row, : n - 1], padding[row, :n] = pack.input_ids, pack.input_ids[1:], False
            weights[:, row, :n], _ = loss_weights(pack, self.depths, "token")
        trained, tokens = float(weights[0].sum()), float((~padding).sum())
        factors = tokens / np.maximum(weights.sum((1, 2), keepdims=True), 1)
        rows = {"input_ids": ids, "labels": labels, "loss_mask": (weights * factors).astype(np.float32)}
        rows |= {"padding_mask": padding, "position_ids": np.broadcast_to(np.arange(length), shape).copy()}
        batch: Batch = {name: torch.from_numpy(array).to(backend.device()) for name, array in rows.items()}
        masks = torch.from_numpy(np.stack([weights[0]] * 2)).to(backend.device())
        counts = Counts(trained, len(packs), tokens, len(packs)).tensor().to(backend.device())
        batch["report"] = Report(masks, counts, torch.zeros(1, device=backend.device()))
        yield batch


def made(lengths: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Conversations of random tokens, and which of them are the answer."""
    generator = np.random.default_rng(0)
    return [
        (generator.integers(3, VOCABULARY, n, dtype=np.int32), (np.arange(n) >= n // 2).astype(np.uint8))
        for n in lengths.tolist()
    ]


def packed_batches(packs: list[Pack], directory: Path, settings: Any) -> SftBatches:
    footer = {"tokenizer_sha256": "t", "template_sha256": "t", "pack_size": settings.seq_length}
    footer["padding_multiple"] = 1
    path = directory / "packs.parquet"
    write(path, packs, footer)
    source = {"source": "made", "weight": 1.0, "template_sha256": "t"}
    source["files"] = [{"path": str(path), "bytes": path.stat().st_size}]
    splits = {"train": [source], "valid": [], "test": []}
    write_json(directory / "blend.json", footer | {"splits": splits})
    info = Info(sha256="t", vocab_size=VOCABULARY, eos_token="", eos_id=0, pad_id=0)
    return SftBatches.load(directory / "blend.json", settings, info, eval_samples=1)


def measure(trainer: loop.Trainer, batches: Batches, steps: int, uncounted: int = 1) -> dict[str, float]:
    """Seconds and tokens of all steps but the first ones."""
    trainer.iteration, trainer.sources = 0, batches.sources
    trainer.ahead = None
    trainer.parallel_model.train()
    while trainer.iteration < uncounted:
        trainer._step(batches)
    trainer.totals.clear()
    trainer.clock.report()
    began = time.monotonic()
    while trainer.iteration < steps:
        with trainer.clock.spend("step"):
            trainer._step(batches)
    seconds = time.monotonic() - began
    spent = trainer.clock.report()
    sums = trainer.totals.sums.means()
    values = {"seconds": seconds, "trained": sums["trained_tokens"]}
    values |= {"conversations": sums["conversations"], "tokens": sums["tokens"]}
    return values | {"waiting": spent["data_seconds"] / spent["step_seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pack-size", type=int, default=1024)
    parser.add_argument("--packs", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--lora", action="store_true")
    args = parser.parse_args()
    lengths = chat_lengths(args.packs * args.pack_size // 250, args.pack_size)
    conversations = made(lengths)
    bins = packing.pack(lengths, args.pack_size, "first_fit_decreasing").lists()
    np.random.default_rng(0).shuffle(bins)  # the longest conversations come first
    bins = bins[: args.packs]
    used = [i for items in bins for i in items]
    in_order = [conversations[i] for i in sorted(used)]
    a_pack = len(used) // len(bins)
    steps_padded = len(in_order) // a_pack
    tuning = {"train_iters": 10_000, "global_batch_size": 1, "cpus_per_task": args.threads}
    tuning["optimizer"] = {"learning_rate": 1e-4, "min_learning_rate": 1e-5}
    if args.model in ("nano", "super") and not args.lora:
        tuning["optimizer"] |= shapes.BF16_STATE
    model, vocabulary = MODELS[args.model]
    stage = "lora" if args.lora else "sft"
    config = load({"model": model, stage: tuning, "sft_data": {"pack_size": args.pack_size}}, {})
    settings, run = train_settings(config, stage), run_settings(config, stage)
    recorded = backend.records_micro_batches(settings, run)
    with distributed(settings.seed, run, recorded=recorded), tempfile.TemporaryDirectory() as directory:
        trainer = loop.Trainer(build_training(settings, run, vocabulary))
        packs = [join([conversations[i] for i in items]) for items in bins]
        padded = PaddedBatches(in_order, a_pack, settings.model.mtp_num_layers)
        packed = packed_batches(packs, Path(directory), settings)
        print(f"{len(used)} conversations, {a_pack} a step, packs of {args.pack_size} tokens\n")
        print("|  | seconds | trained tokens | trained tokens/s | tokens/s | waiting for data | peak, GiB |")
        print("|---|--:|--:|--:|--:|--:|--:|", flush=True)
        ways: list[tuple[str, Batches, int, int]] = [("packed", packed, 1, len(bins))]
        if recorded:
            ways.append(("packed and recorded", packed, len(bins), 2 * len(bins)))
        ways.append(("padded", padded, 1, steps_padded))
        speeds: dict[str, float] = {}
        for name, batches, uncounted, steps in ways:
            schedule: Any = backend.schedule(recorded=recorded)
            trainer.micro_batches = schedule
            if recorded and name != "packed and recorded":
                schedule.steps = -sys.maxsize  # steps until it records
            try:
                r = measure(trainer, batches, steps, uncounted)
            except torch.OutOfMemoryError as error:
                print(f"| {name} | out of memory: {str(error).partition('. GPU')[0]} |")
                break
            speeds[name] = r["trained"] / r["seconds"]
            columns = f"{r['seconds']:.1f} | {r['trained']:,.0f} | {speeds[name]:,.0f}"
            columns += f" | {r['tokens'] / r['seconds']:,.0f} | {r['waiting']:.2%}"
            print(f"| {name} | {columns} | {backend.memory()['peak_memory_gib']:.1f} |", flush=True)
    best = max(speeds, key=speeds.__getitem__)
    for name, speed in speeds.items():
        if name != best:
            print(f"\n{best} / {name}: {speeds[best] / speed:.2f}")


if __name__ == "__main__":
    main()
