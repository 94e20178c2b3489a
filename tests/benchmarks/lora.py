"""LoRA against full fine-tuning in one run: memory, size of a checkpoint, tokens/s.

    python -m tests.benchmarks.lora                  # a model of 100 M parameters (tiny: --model tiny)
    python -m tests.benchmarks.lora --model nano     # the slice of Nano (`shapes`), on a GPU
    python -m tests.benchmarks.lora --gpu-fit        # one of 15 B on a GPU of which 80 GB may be used

Trains on random tokens, one after the other, each in a process of its own, and prints a line of JSON for each
and a table. With --gpu-fit full fine-tuning does not fit (18 bytes a parameter), which is shown and not
assumed: it is started as well, and what it says is below the table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.benchmarks import shapes

VOCABULARY = 2048
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"model": {}, "seq_length": 256},
    "100M": {
        "model": {
            "hybrid_layer_pattern": "MEMEM*EME",
            "hidden_size": 512,
            "num_attention_heads": 8,
            "kv_channels": 64,
            "mamba_num_heads": 16,
            "mamba_head_dim": 64,
            "mamba_state_dim": 64,
            "num_moe_experts": 64,
            "moe_ffn_hidden_size": 512,
            "moe_latent_size": 256,
            "moe_shared_expert_intermediate_size": 1024,
            "mtp_num_layers": 2,
            "mtp_hybrid_layer_pattern": "*E",
            "init_method_std": 0.02,
        },
        "seq_length": 512,
    },
    "nano": {"model": shapes.NANO, "seq_length": 8192, "vocabulary": shapes.VOCABULARY},
    # Layers of Nemotron 3 Super with half of its experts: 15 B parameters, 30 GB in bf16.
    "fit": {
        "model": {
            "hybrid_layer_pattern": "MEMEMEM*EMEMEMEME",
            "hidden_size": 4096,
            "ffn_hidden_size": 2688,
            "num_attention_heads": 32,
            "num_query_groups": 2,
            "kv_channels": 128,
            "mamba_num_heads": 128,
            "mamba_head_dim": 64,
            "mamba_state_dim": 128,
            "mamba_num_groups": 8,
            "num_moe_experts": 256,
            "moe_router_topk": 22,
            "moe_ffn_hidden_size": 2688,
            "moe_latent_size": 1024,
            "moe_shared_expert_intermediate_size": 5376,
            "moe_router_topk_scaling_factor": 5.0,
            "mtp_hybrid_layer_pattern": "*E",
            "init_method_std": 0.014,
            "precision": "bf16",
        },
        "seq_length": 4096,
        "vocabulary": 131072,
    },
}
# Without a search for the fastest kernels, which takes minutes.
UNTUNED = {"MAMBA_DETERMINISTIC": "1", "TRITON_CACHE_AUTOTUNING": "0"}


def measure(kind: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train `full` or `lora` for some steps, in this process."""
    import snaketron.model  # noqa: F401
    from snaketron.config import Adapters, Lora, Model, Run, load
    from snaketron.model import backend
    from snaketron.model.distributed import distributed
    from snaketron.settings.training import LoraSettings, run_settings, train_settings
    from snaketron.sizes.memory import static_memory
    from snaketron.sizes.parameters import num_parameters
    from snaketron.sizes.stages import adapter_parameters
    from snaketron.sizes.work import Work
    from snaketron.train import loop
    from snaketron.train.batches import Batches, sequences
    from snaketron.train.build import build_training

    import torch

    chosen = MODELS[args.model]
    model, length = chosen["model"], chosen["seq_length"]
    vocabulary = chosen.get("vocabulary", VOCABULARY)
    if backend.HAS_GPU:
        model = model | {"precision": "bf16"}
    phase = {"name": "one", "tokens": 1000 * length, "blend": [{"corpus": "docs", "weight": 1}]}
    pretrain = {"seq_length": length, "global_batch_size": 1, "micro_batch_size": 1, "phases": [phase]}
    pretrain |= {"warmup_tokens": 0, "decay_tokens": 64, "cpus_per_task": 2, "save_in_background": False}
    pretrain["optimizer"] = {"learning_rate": 1e-4, "min_learning_rate": 1e-5}
    if args.model == "nano" and kind == "full":
        pretrain["optimizer"] |= shapes.BF16_STATE
    config = load({"model": model, "pretrain": pretrain}, {})
    settings, run = train_settings(config, "pretrain/one"), run_settings(config, "pretrain/one")
    adapters = None
    if kind == "lora":
        adapters = Adapters(rank=args.rank, expert_rank=args.expert_rank)
        settings = LoraSettings(**settings.model_dump(), lora=adapters)
    device = backend.device()
    if backend.HAS_GPU and args.gpu_memory_gb:
        there = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.gpu_memory_gb * 1e9 / there))

    class RandomBatches(Batches):
        def collate(self, split: str, indices: Any) -> dict[str, Any]:
            generator = torch.Generator(device).manual_seed(indices[0])
            ids = torch.randint(0, 97, (1, length + 1), generator=generator, device=device)
            positions = torch.arange(length, device=device)[None]
            tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
            return sequences(tokens, labels, positions, settings.model.mtp_num_layers)

    does: Run = Lora(**adapters.model_dump(), parallel=run.parallel) if adapters else run
    (static,) = static_memory(Work(settings.model, vocabulary, length, 1, does, settings.optimizer))
    trained = base = num_parameters(Model(**model), vocabulary).total
    if adapters:
        trained = adapter_parameters(Model(**model), vocabulary, run.parallel, adapters)[0].total
    result: dict[str, Any] = {
        "kind": kind,
        "device": _name(),
        "parameters": base + (trained if adapters else 0),
        "trained": trained,
        "computed_bytes": static.total,
    }
    began, seconds, losses, at = time.monotonic(), [], [], "building the model"
    recorded = backend.records_micro_batches(settings, run)
    with distributed(settings.seed, run, recorded=recorded):
        try:
            trainer = loop.Trainer(build_training(settings, run, vocabulary))
            result["build_s"] = time.monotonic() - began
            numbers = {True: 0, False: 0}
            for parameter in trainer.model.parameters():
                numbers[parameter.requires_grad] += parameter.numel()
            assert (numbers[True], sum(numbers.values())) == (trained, result["parameters"])
            for step in range(args.steps):
                at = f"step {step + 1}"
                began = time.monotonic()
                trainer._step(RandomBatches(1))
                if backend.HAS_GPU:
                    torch.cuda.synchronize()
                seconds.append(time.monotonic() - began)
                losses.append(trainer._mean_loss())
                trainer.totals.clear()
        except torch.OutOfMemoryError as error:
            result["out_of_memory"] = f"{at}: {str(error).partition('. GPU')[0]}"
        result |= backend.memory()
        if "out_of_memory" not in result:
            result["measured_bytes"] = kept(trainer)
            with tempfile.TemporaryDirectory() as directory:
                trainer.save(Path(directory))
                result["checkpoint_bytes"] = sum(
                    p.stat().st_size for p in Path(directory).rglob("*") if p.is_file()
                )
            steady = sorted(seconds[1:] or seconds)[len(seconds[1:]) // 2]
            result |= {
                "step_s": steady,
                "tokens_per_second": length / steady,
                "first_step_s": seconds[0],
                "losses": [round(loss, 4) for loss in losses],
            }
    return result


def kept(trainer: Any) -> int:
    """Bytes of weights, gradient buffers and optimizer."""
    import torch

    model = trainer.parallel_model
    tensors = [*trainer.model.parameters()]
    tensors += [buffer.grad_data for buffer in (*model.buffers, *model.expert_parallel_buffers)]
    for one in trainer.optimizer.chained_optimizers:
        for group in one.optimizer.param_groups:
            for parameter in group["params"]:
                tensors += [v for v in one.optimizer.state[parameter].values() if torch.is_tensor(v)]
                if trainer.built.config.bf16:
                    tensors.append(parameter)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def table(results: dict[str, dict[str, Any]]) -> str:
    rows = ["| | full | LoRA | full / LoRA |", "|---|--:|--:|--:|"]
    for title, key, unit in (
        ("parameters", "parameters", 1e6),
        ("of them trained", "trained", 1e6),
        ("weights, gradients, optimizer: computed", "computed_bytes", 1e6),
        ("the same, measured", "measured_bytes", 1e6),
        ("peak memory (of a CPU: the process)", "peak_memory_gib", 1),
        ("checkpoint", "checkpoint_bytes", 1e6),
        ("tokens/s", "tokens_per_second", 1),
    ):
        values = [results.get(kind, {}).get(key) for kind in ("full", "lora")]
        suffix = " MB" if key.endswith("bytes") else " GiB" if key.endswith("gib") else ""
        suffix = " M" if key in ("parameters", "trained") else suffix
        cells = ["-" if v is None else f"{v / unit:,.1f}{suffix}" for v in values]
        ratio = f"{values[0] / values[1]:.2f}" if None not in values else "-"
        rows.append(f"| {title} | {cells[0]} | {cells[1]} | {ratio} |")
    for kind, result in results.items():
        if problem := result.get("out_of_memory") or result.get("failed"):
            rows.append(f"\n{kind}: out of memory, {problem}" if "out_of_memory" in result else problem)
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="100M")
    parser.add_argument("--gpu-fit", action="store_true", help="the model `fit`, in 80 GB")
    parser.add_argument("--gpu-memory-gb", type=float, help="10^9 bytes of the GPU that may be used")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--expert-rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--timeout", type=float, default=240, help="seconds for each of the two")
    parser.add_argument("--one", choices=("full", "lora"), help="measure this one, in this process")
    args = parser.parse_args()
    if args.gpu_fit:
        args.model, args.gpu_memory_gb = "fit", args.gpu_memory_gb or 80.0
    if args.one:
        print(json.dumps(measure(args.one, args)), flush=True)
        return 0
    results: dict[str, dict[str, Any]] = {}
    for kind in ("full", "lora"):
        command = [sys.executable, "-m", "tests.benchmarks.lora", *sys.argv[1:], "--one", kind]
        with contextlib.suppress(subprocess.TimeoutExpired):
            done = subprocess.run(
                command,
                env=UNTUNED | os.environ,
                capture_output=True,
                text=True,
                timeout=args.timeout,
            )
            lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
            results[kind] = json.loads(lines[-1]) if lines else {"failed": done.stderr[-3000:]}
        results.setdefault(kind, {"failed": f"{kind}: no result within {args.timeout:.0f} s"})
        print(json.dumps({"kind": kind} | results[kind]), flush=True)
    print(table(results))
    return int(any("failed" in result for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
