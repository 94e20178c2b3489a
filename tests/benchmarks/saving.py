"""How long a training waits for a checkpoint: written at once, in the background, and read.

    python -m tests.benchmarks.saving --hidden 512 --directory /tmp/saving
    python -m tests.benchmarks.saving --large --directory /tmp/saving       # on a GPU

Trains the default model at another width, or that of gpu_training.py with fewer experts, on random tokens,
saves twice, the second time when the first checkpoint has been there for a few steps, and prints the seconds
that the step loop stood still for each, the time until each was written and to read the last, the size of a
checkpoint, and the peak of host memory.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import snaketron.model  # noqa: F401  before megatron
from snaketron.config import load
from snaketron.model.distributed import distributed
from snaketron.settings.training import run_settings, train_settings
from snaketron.train import loop
from snaketron.train.batches import Batches, sequences
from snaketron.train.build import build_training
from snaketron.train.losses import Batch

import torch
from tests.benchmarks.shapes import MODEL

LENGTH, VOCABULARY, STEPS = 128, 4096, 3  # steps before each save


class RandomBatches(Batches):
    def __init__(self, micro_batch_size: int, depths: int) -> None:
        super().__init__(micro_batch_size)
        self.depths = depths

    def collate(self, split: str, indices: Any) -> Batch:
        generator = torch.Generator().manual_seed(indices[0])
        ids = torch.randint(0, VOCABULARY, (len(indices), LENGTH + 1), generator=generator)
        positions = torch.arange(LENGTH).expand(len(indices), -1).contiguous()
        return sequences(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), positions, self.depths)


def measure(directory: Path, model: dict[str, Any], *, background: bool) -> None:
    phase = {"name": "one", "tokens": 100 * 4 * LENGTH, "blend": [{"corpus": "docs", "weight": 1}]}
    pretrain = {"seq_length": LENGTH, "micro_batch_size": 4, "phases": [phase], "decay_tokens": 64}
    pretrain |= {"warmup_tokens": 0, "save_in_background": background, "keep_checkpoints": 1}
    config = load({"model": model, "pretrain": pretrain}, {})
    settings, run = train_settings(config, "pretrain/one"), run_settings(config, "pretrain/one")
    shutil.rmtree(directory, ignore_errors=True)
    with distributed(settings.seed, run):
        trainer = loop.Trainer(build_training(settings, run, VOCABULARY))
        trainer.saver.prepare(trainer.optimizer)
        batches = RandomBatches(4, settings.model.mtp_num_layers)
        stalls, written = [], []
        loop.freeze()
        for _ in range(2):
            for _ in range(STEPS):
                trainer._step(batches)
            began = time.monotonic()
            trainer.save(directory)
            stalls.append(time.monotonic() - began)
            while True:
                before = time.monotonic()
                done = trainer.saver.finish(wait=False)
                stalls[-1] += time.monotonic() - before
                if done:
                    break
                trainer._step(batches)
            written.append(time.monotonic() - began)
        began = time.monotonic()
        trainer.resume(directory)
        read = time.monotonic() - began
    size = sum(p.stat().st_size for p in directory.glob("iter_*/*")) / 1e6
    still, whole = (" and ".join(f"{value:.2f}" for value in values) for values in (stalls, written))
    how = "background" if background else "at once"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{how:10}  {size:.0f} MB, stood still {still} s for the saves, written after {whole} s, read in "
        f"{read:.2f} s; at most {peak:.2f} GiB of the host",
        flush=True,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--large", action="store_true")
    args = parser.parse_args()
    model = (
        MODEL | {"num_moe_experts": 8, "hybrid_layer_pattern": "MEMEM*EME"}
        if args.large
        else {"hidden_size": args.hidden, "precision": "bf16"}
    )
    for background in (False, True):
        measure(args.directory, model, background=background)
