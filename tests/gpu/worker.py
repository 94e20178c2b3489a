"""One process of a training that the GPU tests start: on CPUs or GPUs, in any layout, from any checkpoint.

    torchrun ... -m tests.gpu.worker '{"directory": ..., "steps": 4}'

The last rank prints, as a line of JSON: the losses and gradient norms of the steps, the validation loss
before them, and a hash of the weights and optimizer states of each rank after them. With adapters (`lora`:
keys of the configuration, `base`: the checkpoint they are for) also the validation losses after the last step
and after merging.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import snaketron.model  # noqa: F401  before megatron
from snaketron.config import Adapters, load
from snaketron.data.chats.packs import join, write
from snaketron.data.tokenizer import Info
from snaketron.files import write_json
from snaketron.jobs.launch import is_writer
from snaketron.model import backend
from snaketron.model.distributed import distributed
from snaketron.model.lora import merge
from snaketron.settings.training import LoraSettings, run_settings, train_settings
from snaketron.train import loop
from snaketron.train.batches import Batches, sequences
from snaketron.train.build import build_training
from snaketron.train.evaluate import evaluate
from snaketron.train.sft_batches import SftBatches
from tests.unit.sizes.models import SMALL

import numpy as np
import torch
from megatron.core.transformer.cuda_graphs import _CudagraphGlobalRecord

VOCABULARY, LENGTH, BATCH = 512, 64, 4


class FixedBatches(Batches):
    """Tokens that depend on the sample number alone, the same on each machine."""

    def __init__(self, micro_batch_size: int, depths: int, length: int = LENGTH) -> None:
        super().__init__(micro_batch_size)
        self.depths, self.length = depths, length

    def has(self, split: str) -> bool:
        return split != "test"

    def collate(self, split: str, indices: Any) -> dict[str, Any]:
        rows = [
            np.random.default_rng([split == "valid", i]).integers(0, 97, self.length + 1) for i in indices
        ]
        ids = torch.from_numpy(np.stack(rows))
        positions = torch.arange(self.length).expand(len(rows), -1).contiguous()
        return sequences(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), positions, self.depths)


def write_packs(directory: Path, count: int = 40, pack_size: int = 4 * LENGTH) -> Path:
    """Packs of conversations of 8 to 40 tokens, with room for context parallelism, and their blend.

    Larger packs have 2 to 20 of them, and two of three packs one of 600 as well.
    """
    generator = np.random.default_rng(0)
    packs = []
    for i in range(count):
        lengths = generator.integers(8, 41, 6 if pack_size == 4 * LENGTH else generator.integers(2, 21))
        if pack_size > 4 * LENGTH and i % 3:
            lengths = np.insert(lengths[: (pack_size - 600) // 44], 1, 600)
        ids = [generator.integers(3, 97, n, dtype=np.int32) for n in lengths]
        packs.append(join([(x, (np.arange(len(x)) >= len(x) // 3).astype(np.uint8)) for x in ids]))
    footer = {"tokenizer_sha256": "t", "template_sha256": "t", "pack_size": pack_size, "padding_multiple": 4}
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "packs.parquet"
    write(path, packs, footer)
    source: dict[str, Any] = {"source": "made", "weight": 1.0, "template_sha256": "t"}
    source["files"] = [{"path": str(path), "bytes": path.stat().st_size}]
    write_json(
        directory / "blend.json", footer | {"splits": {s: [source] for s in ("train", "valid", "test")}}
    )
    return directory / "blend.json"


def packed(blend: str, model: dict[str, Any], run: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Settings of a tuning on packs, how it is run, and a function that makes its batches."""
    pack_size = json.loads(Path(blend).read_text())["pack_size"]
    sft = {"train_iters": 20, "global_batch_size": BATCH, "warmup_iters": 0, "cpus_per_task": 1}
    sft |= {"eval_samples": 4} | run
    config = load({"model": SMALL | model, "sft": sft, "sft_data": {"pack_size": pack_size}}, {})
    settings = train_settings(config, "sft")
    info = Info(sha256="t", vocab_size=VOCABULARY, eos_token="", eos_id=0, pad_id=0)
    return (
        settings,
        run_settings(config, "sft"),
        lambda: SftBatches.load(Path(blend), settings, info, eval_samples=4),
    )


def fixed(model: dict[str, Any], run: dict[str, Any], cluster: dict[str, Any]) -> tuple[Any, Any, Any]:
    """As `packed`, of a pretraining on fixed tokens."""
    phase = {"name": "one", "tokens": 100 * BATCH * LENGTH, "blend": [{"corpus": "docs", "weight": 1}]}
    pretrain = {"seq_length": LENGTH, "global_batch_size": BATCH, "micro_batch_size": 2, "phases": [phase]}
    length = run.get("seq_length", LENGTH)
    pretrain |= {"warmup_tokens": 0, "decay_tokens": 64, "cpus_per_task": 1, "eval_samples": 4} | run
    config = load({"model": SMALL | model, "pretrain": pretrain, "cluster": cluster}, {})
    settings, run_as = train_settings(config, "pretrain/one"), run_settings(config, "pretrain/one")
    depths = settings.model.mtp_num_layers
    return settings, run_as, lambda: FixedBatches(run_as.micro_batch_size, depths, length)


def state_hash(trainer: loop.Trainer) -> str:
    digest = hashlib.sha256()
    for tensor in [*trainer.model.parameters(), *_kept(trainer.optimizer)]:
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _kept(optimizer: Any) -> Iterator[torch.Tensor]:
    """This process' part of the main weights and moments."""
    for part in optimizer.chained_optimizers:
        if getattr(part, "is_stub_optimizer", False):
            continue
        for parameter in (p for group in part.optimizer.param_groups for p in group["params"]):
            yield parameter
            yield from (v for v in part.optimizer.state[parameter].values() if isinstance(v, torch.Tensor))


def main(directory: str, steps: int, save_at: list[int], **keys: Any) -> None:
    """Train from what `directory` holds to step `steps`, save at some of them, and validate at some."""
    valid_at = keys.pop("valid_at", [])
    model, run, cluster = (keys.pop(key, {}) for key in ("model", "run", "cluster"))
    blend, lora, base = (keys.pop(key, None) for key in ("blend", "lora", "base"))
    if keys:
        raise TypeError(f"unknown: {keys}")
    if blend:
        settings, run_as, make_batches = packed(blend, model, run)
    else:
        settings, run_as, make_batches = fixed(model, run, cluster)
    if lora is not None:
        settings = LoraSettings(**settings.model_dump(), lora=Adapters(**lora))
    run_as = backend.with_recorded_layers(settings, run_as, VOCABULARY)
    recorded = backend.records_micro_batches(settings, run_as)
    with distributed(settings.seed, run_as, recorded=recorded):
        trainer = loop.Trainer(build_training(settings, run_as, VOCABULARY))
        trainer.seconds = 1.0
        if base:
            trainer.start_from(Path(base), optimizer_of_base=False)
        resumed = trainer.resume(Path(directory))
        batches = make_batches()
        trainer.sources = batches.sources
        found: dict[str, Any] = {"resumed": resumed, "losses": [], "mtp": [], "norms": []}
        found["valid"] = evaluate(trainer.built, batches, "valid")["valid_loss"]
        while trainer.iteration < steps:
            trainer.totals.clear()
            found["norms"].append(float(trainer._step(batches)))
            line = trainer._line(0.0)
            found["losses"].append(line["loss"])
            found["mtp"].append(line.get("mtp_1_loss"))
            if trainer.iteration in save_at:
                trainer.save(Path(directory))
            if trainer.iteration in valid_at:
                evaluate(trainer.built, batches, "valid")
        trainer.saver.finish()
        if lora is not None:
            found["tuned"] = evaluate(trainer.built, batches, "valid")["valid_loss"]
            merge(trainer.model)
            found["merged"] = evaluate(trainer.built, batches, "valid")["valid_loss"]
        found["valid_after"] = evaluate(trainer.built, batches, "valid")["valid_loss"]
        layers = _CudagraphGlobalRecord.cudagraph_created
        found["recorded"] = "micro-batches" if recorded else "layers" if layers else "nothing"
        hashes: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(hashes, state_hash(trainer))
        if is_writer():
            print("RESULT " + json.dumps(found | {"hashes": hashes}), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
