"""The memory of a training on a CPU: the estimate of the dry-run against the tensors of a step.

    python -m tests.benchmarks.cpu_memory

What lives between steps is counted from the tensors that Python knows, what a step adds by torch's profiler.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import snaketron.model  # noqa: F401  before megatron
from snaketron.config import load
from snaketron.model.distributed import distributed
from snaketron.settings.training import run_settings, train_settings
from snaketron.sizes.plan import estimate
from snaketron.train import loop
from snaketron.train.batches import Batches
from snaketron.train.build import build_training
from snaketron.train.losses import Batch, Counts, Report

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

LARGER = {
    "hybrid_layer_pattern": "MEM*EM-E",
    "hidden_size": 512,
    "ffn_hidden_size": 1024,
    "num_attention_heads": 8,
    "kv_channels": 64,
    "mamba_num_heads": 16,
    "mamba_head_dim": 64,
    "mamba_state_dim": 64,
    "mamba_num_groups": 4,
    "moe_ffn_hidden_size": 512,
    "moe_latent_size": 256,
    "moe_shared_expert_intermediate_size": 1024,
    "mtp_hybrid_layer_pattern": "*E",
}
TWO_DEPTHS = {"hybrid_layer_pattern": "MEM*EME", "mtp_num_layers": 2, "mtp_hybrid_layer_pattern": "*E"}
# Model, keys of the run, sequences of a micro-batch, their length, tokens of the vocabulary.
type Case = tuple[dict[str, Any], dict[str, Any], int, int, int]
CASES: dict[str, Case] = {
    "the default": ({}, {}, 4, 256, 2048),
    "in bf16": ({"precision": "bf16"}, {}, 4, 256, 2048),
    "`recompute: [moe]`": ({}, {"recompute": ["moe"]}, 4, 256, 2048),
    "`recompute: [layer]`": ({}, {"recompute": ["layer"]}, 4, 256, 2048),
    "`recompute: [layer]`, two depths": (TWO_DEPTHS, {"recompute": ["layer"]}, 4, 256, 2048),
    "30 million parameters": (LARGER, {}, 4, 512, 8192),
}


class Made(Batches):
    """Random tokens, all trained."""

    sources = ("made",)

    def __init__(self, count: int, length: int, vocab_size: int, depths: int) -> None:
        super().__init__(count)
        self.length, self.vocab_size, self.depths = length, vocab_size, depths

    def collate(self, split: str, indices: Sequence[int]) -> Batch:
        shape = (len(indices), self.length)
        ids = np.random.default_rng(indices[0]).integers(self.vocab_size, size=(shape[0], shape[1] + 1))
        tokens = float(len(indices) * self.length)
        return {
            "input_ids": torch.from_numpy(ids[:, :-1].copy()),
            "labels": torch.from_numpy(ids[:, 1:].copy()),
            "loss_mask": torch.ones(1 + self.depths, *shape),
            "position_ids": torch.arange(self.length).expand(shape).contiguous(),
            "report": Report(
                torch.ones(2, *shape),
                Counts(tokens, len(indices), tokens, len(indices)).tensor(),
                torch.zeros(1),
            ),
        }


def living() -> int:
    """Bytes of all tensors that there are, each storage once."""
    gc.collect()
    tensors = (thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor))
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def peak(profiled: profile) -> int:
    """The most bytes that were allocated beside what was there before."""
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
    return int(np.cumsum([change for _, change in changes]).max())


def measure(case: Case) -> tuple[float, int]:
    """The estimate, and what was measured, in bytes."""
    model, run_keys, count, length, vocab_size = case
    mix = [{"corpus": "docs", "weight": 1}]
    keys: dict[str, Any] = {"global_batch_size": count, "micro_batch_size": count, "seq_length": length}
    keys |= {"warmup_tokens": 0, "decay_tokens": count * length, **run_keys}
    keys["phases"] = [{"name": "one", "tokens": 100 * count * length, "blend": mix}]
    config = load({"model": model, "pretrain": keys, "tokenizer": {"vocab_size": vocab_size}}, {})
    settings, run = train_settings(config, "pretrain/one"), run_settings(config, "pretrain/one")
    with distributed(settings.seed, run, recorded=False):
        trainer = loop.Trainer(build_training(settings, run, vocab_size))
        batches = Made(count, length, vocab_size, config.model.mtp_num_layers)
        trainer.sources = batches.sources
        trainer.parallel_model.train()
        for _ in range(2):
            trainer._step(batches)
        before = living()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            trainer._step(batches)
    return estimate(config, config.training("pretrain/one")).host_bytes, before + peak(profiled)


def main() -> None:
    print("|  | estimated (MB) | measured (MB) | difference |")
    print("|---|--:|--:|--:|", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as one_process_a_case:
        for name, found in zip(CASES, one_process_a_case.map(measure, CASES.values()), strict=True):
            estimated, measured = found
            columns = f"{estimated / 1e6:.1f} | {measured / 1e6:.1f} | {estimated / measured - 1:+.0%}"
            print(f"| {name} | {columns} |", flush=True)


if __name__ == "__main__":
    main()
