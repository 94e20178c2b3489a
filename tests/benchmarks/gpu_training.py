"""Speed and memory of training on a GPU, one setting after the other.

    python -m tests.benchmarks.gpu_training                       # all variants for the GPUs that are there
    python -m tests.benchmarks.gpu_training baseline graphs       # some

Each variant trains a model with `Trainer`, in processes of its own that start (import) while another one
measures: that of `MODEL` (`shapes`), or a slice of Nemotron 3 Super or Nano at its own widths, as one GPU of
a training with expert parallelism holds it, without the exchange between GPUs. Tokens are random, or those of
a text (`text_tokens`) with the routing that follows from it. Lines of JSON come on standard output and a
table at the end; with --profile NAME also what took the time, by kind of kernel, and a trace for
chrome://tracing.
Tokens of "even" variants go to random experts, as where speeds with evenly loaded experts are published.
The estimate is that of `sizes.memory.peak_bytes`, the peak that of the fullest GPU. "Load" is the
tokens of the fullest expert over the mean in the last step: of the worst layer, and the mean over layers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snaketron.config import Config, Parallel, load

from tests.benchmarks.shapes import BF16_STATE, FP8, MODEL, QUARTER, SLICE, SLICES, VOCABULARY, text_tokens
from tests.benchmarks.turns import Turn, take, wait_for_turn

if TYPE_CHECKING:  # imported by a process when it measures, which tells how long that takes
    from snaketron.train.batches import Batches
    from snaketron.train.loop import Trainer

    from torch import Tensor

# megatron-core's own defaults, with the switches that the first attempt had.
PLAIN = {
    "moe_router_fusion": False,
    "cross_entropy_fusion_impl": "native",
    "gradient_accumulation_fusion": False,
}
GRAPHS = {"cuda_graphs": True}
LAUNCHED = {"cuda_graphs": False}
ALLTOALL = {"moe_token_dispatcher": "alltoall"}
# Transformer Engine's grouped products instead of our experts.
THEIRS = {"SNAKETRON_THEIR_EXPERTS": "1"}
CUTLASS = THEIRS | {"NVTE_USE_CUTLASS_GROUPED_GEMM": "1"}
EVEN = {"moe_router_force_load_balancing": True}
SPREAD = (2, 4, 8)


def spread(gpus: int, precision: str = "bf16", experts: int = 0) -> dict[str, Any]:
    """The slice of Nano, on tokens of a text, with expert parallelism."""
    parallel = {"expert_model_parallel_size": gpus, "data_parallel_size": gpus}
    model = {"num_moe_experts": experts or 16 * gpus, "precision": precision}
    return SLICES["nano_8k"] | {"model": model, "text": True, "parallel": parallel}


def shared(
    of: str, precision: str = "bf16", *, experts: int, split: str = "time", **sizes: int
) -> dict[str, Any]:
    """Layers of Super or Nano on two GPUs, on tokens of a text."""
    parallel = {f"{name}_parallel_size": size for name, size in sizes.items()}
    shape = SLICES[of] | {"model": {"num_moe_experts": experts, "precision": precision}, "text": True}
    return shape | {"parallel": parallel | {"pipeline_split": split}, "steps": 10}


def quarter(gpus: int, layout: str) -> dict[str, Any]:
    """22 layers of Super with evenly loaded experts: in two stages, with TP, or with EP alone."""
    shape = SLICE | {"of": QUARTER, "length": 8192, "config": EVEN}
    if layout == "pp2":
        sizes = {"pipeline_model": 2, "expert_model": gpus // 2, "data": gpus // 2}
        # The scan again, because the first stage keeps two micro-batches of 14 layers.
        shape |= {"micro_batches": 16, "run": {"recompute": ["scan"]}, "steps": 8}
    elif layout == "tp4":
        sizes = {"tensor_model": 4, "expert_model": gpus, "data": gpus // 4}
        shape |= {"micro_batches": 8, "micro_batch_size": 2}  # so that an expert has 704 rows at least
    else:
        sizes = {"expert_model": gpus, "data": gpus}
        shape |= {"micro_batches": 8, "steps": 8}
    return shape | {"parallel": {f"{name}_parallel_size": size for name, size in sizes.items()}}


# Layouts of two GPUs: as the program chooses, and with alltoall, attention and Mamba layers recorded or not.
OF_TWO = {
    "nano_8k_tp2_ep2": shared("nano_8k", experts=32, tensor_model=2, expert_model=2),
    "nano_8k_ep2_fp8": shared("nano_8k", "fp8_current", experts=32, expert_model=2, data=2),
    "nano_8k_pp2": shared("nano_8k", experts=16, pipeline_model=2),
    "super_8k_tp2_text": shared("super_8k", experts=64, tensor_model=2) | {"micro_batches": 4},
    "super_8k_tp2_ep2": shared("super_8k", experts=128, tensor_model=2, expert_model=2)
    | {"micro_batches": 4},
    "nano_8k_ep2_text": shared("nano_8k", experts=32, expert_model=2, data=2),
    "super_8k_ep2_text": shared("super_8k", experts=128, expert_model=2, data=2),
    **{
        f"super_22_pp2_{split}": shared("super_8k", experts=64, pipeline_model=2, split=split)
        | {"of": QUARTER, "micro_batches": 16}
        for split in ("time", "layers")
    },
}
VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {"config": PLAIN, "environment": THEIRS},
    "baseline_mbs1": {"config": PLAIN, "environment": THEIRS, "micro_batch_size": 1},
    "te_loss": {"config": PLAIN | {"cross_entropy_fusion_impl": "te"}, "environment": THEIRS},
    "wgrad": {"config": {"moe_router_fusion": False}, "environment": THEIRS},
    "cutlass": {"config": {"moe_router_fusion": False}, "environment": CUTLASS},
    "router": {"environment": CUTLASS},
    "router_graphs": {"run": GRAPHS, "environment": CUTLASS},
    "one": {},
    "x4": {"micro_batches": 4},
    "mbs1": {"micro_batch_size": 1},
    "mbs8": {"micro_batch_size": 8},
    "mbs8_x2": {"micro_batch_size": 8, "micro_batches": 2},
    "graphs": {"run": GRAPHS},
    "graphs_x4": {"run": GRAPHS, "micro_batches": 4},
    "graphs_mbs1": {"run": GRAPHS, "micro_batch_size": 1},
    "graphs_mbs8": {"run": GRAPHS, "micro_batch_size": 8},
    "recompute_moe": {"run": {"recompute": ["moe"]}},
    "recompute_layer": {"run": {"recompute": ["layer"]}},
    "bf16_state": {"optimizer": BF16_STATE},
    "offload": {"run": {"offload_optimizer": 0.5}},
    "fp8_delayed_x4": {"model": {"precision": "fp8_delayed"}, "micro_batches": 4},
    "fp8_current_x4": {"model": {"precision": "fp8_current"}, "micro_batches": 4},
    "fp8_blockwise_x4": {"model": {"precision": "fp8_blockwise"}, "micro_batches": 4},
    "fp8_experts_x4": {
        "model": {"precision": "fp8_current"},
        "micro_batches": 4,
        "environment": THEIRS,
    },
    **SLICES,
    **{f"{name}_text": shape | {"text": True} for name, shape in SLICES.items()},
    **{f"{name}_{p}": shape | {"model": {"precision": p}} for name, shape in SLICES.items() for p in FP8},
    **{
        f"{name}_mbs2": shape | {"micro_batch_size": 2, "micro_batches": shape["micro_batches"] // 2}
        for name, shape in SLICES.items()
    },
    # Megatron-LM counts a layer a depth of multi-token prediction, and fails at one depth of two layers.
    "super_8k_mtp2": SLICES["super_8k"] | {"model": {"mtp_num_layers": 2}},
    "nano_4k_layers": SLICES["nano_4k"] | {"run": GRAPHS},
    # Experts on all GPUs, as many on each as in the slice: on eight it is Nano whole.
    **{f"nano_8k_ep{n}": spread(n) for n in SPREAD},
    **{f"nano_8k_ep{n}_launched": spread(n) | {"run": LAUNCHED} for n in SPREAD},
    **{f"nano_8k_ep{n}_even": spread(n) | {"config": EVEN} for n in SPREAD},
    **{
        f"nano_8k_ep{n}_even_fp8_current": spread(n, precision="fp8_current") | {"config": EVEN}
        for n in SPREAD
    },
    **{f"super_22_{layout}_{n}_even": quarter(n, layout) for n in (4, 8) for layout in ("pp2", "tp4", "ep")},
    # 9 layers of Super with all experts, as many parameters a GPU as 22 of them have on four.
    "super_9_ep2_even": quarter(2, "ep") | {"of": QUARTER | {"hybrid_layer_pattern": "MEMEM*EME"}},
    "nano_30b_ep4_even": spread(4, experts=128) | {"config": EVEN},
    "super_8k_dp2": SLICES["super_8k"] | {"parallel": {"data_parallel_size": 2}},
    "super_8k_dp2_launched": SLICES["super_8k"] | {"parallel": {"data_parallel_size": 2}, "run": LAUNCHED},
    "super_8k_dp2_overlap": SLICES["super_8k"]
    | {"parallel": {"data_parallel_size": 2}, "run": LAUNCHED}
    | {"ddp": {"overlap_grad_reduce": True}},
    "super_8k_ep2": SLICES["super_8k"]
    | {"model": {"num_moe_experts": 128}}
    | {"parallel": {"expert_model_parallel_size": 2, "data_parallel_size": 2}},
    **OF_TWO,
    **{f"{name}_recorded": variant | {"run": GRAPHS | ALLTOALL} for name, variant in OF_TWO.items()},
    **{f"{name}_launched": variant | {"run": LAUNCHED | ALLTOALL} for name, variant in OF_TWO.items()},
    "super_8k_tp2": SLICES["super_8k"] | {"parallel": {"tensor_model_parallel_size": 2}},
    "dp2": {"parallel": {"data_parallel_size": 2}},
    "dp2_overlap": {"parallel": {"data_parallel_size": 2}, "ddp": {"overlap_grad_reduce": True}},
    "dp2_x4": {"parallel": {"data_parallel_size": 2}, "micro_batches": 4},
    "ep2": {"parallel": {"expert_model_parallel_size": 2, "data_parallel_size": 2}},
    "tp2_connections": {
        "parallel": {"tensor_model_parallel_size": 2},
        "environment": {"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
    },
    "tp2": {"parallel": {"tensor_model_parallel_size": 2}},
    "pp2": {"parallel": {"pipeline_model_parallel_size": 2}, "micro_batches": 4},
    "cp2": {"parallel": {"context_parallel_size": 2}},
}


def gpus(name: str) -> int:
    return Parallel(**VARIANTS[name].get("parallel", {})).world_size


def configured(variant: dict[str, Any]) -> Config:
    """The configuration whose phase `one` is a variant's training."""
    length, parallel = variant.get("length", 4096), variant.get("parallel", {})
    size = variant.get("micro_batch_size", 4)
    batch = size * variant.get("micro_batches", 1) * parallel.get("data_parallel_size", 1)
    phase = {"name": "one", "tokens": 100 * batch * length, "blend": [{"corpus": "docs", "weight": 1}]}
    pretrain = {"seq_length": length, "global_batch_size": batch, "micro_batch_size": size}
    pretrain |= {"warmup_tokens": 0, "decay_tokens": 64, "phases": [phase], "cpus_per_task": 4}
    pretrain |= variant.get("run", {}) | {"parallel": parallel}
    pretrain["optimizer"] = {"learning_rate": 1e-4, "min_learning_rate": 1e-5} | variant.get("optimizer", {})
    return load({"model": variant.get("of", MODEL) | variant.get("model", {}), "pretrain": pretrain}, {})


def steady(seconds: list[float]) -> float:
    """The time of a step once kernels are chosen: the median of the last six."""
    return sorted(seconds[-6:])[2]


# Kinds of kernels by what their names contain; the first that fits.
KINDS = {
    "exchanges and sums": r"nccl|deep_ep|hybrid_ep",
    "experts' products": r"GroupProblemShape|grouped|Grouped|^_product|^_activate|^_round_rows|^_transpose",
    "matrix products": r"nvjet|gemm|Gemm|cutlass|cublas",
    "Mamba": r"_chunk_|_state_passing|_bmm_chunk|^_convolve|^_(carry|output|(x|group|scores|step)_back)$",
    "attention": r"fmha|flash|sdpa|cudnn",
    "cross entropy": r"cross_entropy",
    "permutation": r"permute|row_id|sort_chunks|_make_chunk",
    "router": r"topk|router|aux_loss|score_function",
    "norms": r"rmsnorm|layernorm|ln_fwd|ln_bwd|^_norm|^_add_parts",
    "rounding to fp8": r"fp8|quantize|amax|transpose",
    "optimizer": r"adam|Adam|multi_tensor|l2norm|lpnorm",
    "element by element": r"elementwise|triton_|Memcpy|Memset|CatArray|reduce|index|embedding",
}


def kinds(rows: list[Any]) -> dict[str, float]:
    """Milliseconds on the GPU by kind of kernel, of the rows of a profile."""
    found: dict[str, float] = {}
    for row in rows:
        if not row.cpu_time_total:
            kind = next((k for k, names in KINDS.items() if re.search(names, row.key)), "others")
            found[kind] = found.get(kind, 0.0) + row.self_device_time_total / 1e3
    return {k: round(v, 1) for k, v in sorted(found.items(), key=lambda item: -item[1])}


def measure(name: str, profile: bool) -> dict[str, Any]:
    """Train a variant in this process, one of its ranks; what is told of it."""
    variant = VARIANTS[name]
    os.environ.update(variant.get("environment", {}))
    began = time.monotonic()
    import snaketron.model  # noqa: F401
    from snaketron.model import backend
    from snaketron.model.distributed import distributed
    from snaketron.settings.training import run_settings, train_settings
    from snaketron.train import loop
    from snaketron.train.build import build_training

    result: dict[str, Any] = {"name": name, "import_s": time.monotonic() - began}
    wait_for_turn()
    began = time.monotonic()
    config, steps = configured(variant), variant.get("steps", 12)
    settings, run = train_settings(config, "pretrain/one"), run_settings(config, "pretrain/one")
    batches = batches_of(config, steps, of_text=variant.get("text", False))
    replace(variant)
    run = backend.with_recorded_layers(settings, run, VOCABULARY)
    recorded = backend.records_micro_batches(settings, run)
    with distributed(settings.seed, run, recorded=recorded):
        trainer = loop.Trainer(build_training(settings, run, VOCABULARY))
        result["build_s"] = time.monotonic() - began
        taken = Steps(name if profile else "")
        taken.take(trainer, batches, steps)
        result |= taken.told(config, trainer)
    return result | (profiled(taken.profiler.key_averages()) if profile else {})


def batches_of(config: Config, steps: int, *, of_text: bool) -> Batches:
    """Random tokens, or those of a text, on the device."""
    from snaketron.model import backend
    from snaketron.train.batches import Batches, sequences

    import torch

    batch, length = config.pretrain.global_batch_size, config.pretrain.seq_length
    device, depths = backend.device(), config.model.mtp_num_layers
    text = torch.tensor(text_tokens(steps * batch * length + 1)) if of_text else None

    class RandomBatches(Batches):
        def collate(self, split, indices):
            generator = torch.Generator(device).manual_seed(indices[0])
            shape = (len(indices), length + 1)
            if text is not None:
                # A training reads the first batch of the next step ahead, also after the last one.
                rows = torch.tensor(indices)[:, None] % (steps * batch) * length + torch.arange(length + 1)
                ids = text[rows].to(device)
            else:
                # Half of the tokens are one of few, so that there is something to learn.
                ids = torch.randint(0, VOCABULARY, shape, generator=generator, device=device)
                ids = torch.where(ids % 2 == 0, ids, ids % 97)
            positions = torch.arange(length, device=device).expand(len(indices), -1).contiguous()
            return sequences(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), positions, depths)

    return RandomBatches(config.pretrain.micro_batch_size)


def replace(variant: dict[str, Any]) -> None:
    """Have this process train as a variant does, beyond what can be configured."""
    from snaketron.model import backend, spec

    if "SNAKETRON_THEIR_EXPERTS" in os.environ:  # of this program alone
        from snaketron.model.megatron import gpu

        gpu._our_experts = lambda *_: None
    plain = spec.transformer_config
    spec.transformer_config = lambda *a, **k: plain(*a, **(k | variant.get("config", {})))
    options = backend.data_parallel_options
    backend.data_parallel_options = lambda *a: options(*a) | variant.get("ddp", {})


@dataclass
class Steps:
    """Steps of a training, one by one, and what each was like.

    The tenth is profiled where `profiled_as` names it, and its trace written. `loads` are the tokens of each
    expert, by layer, in the last step.
    """

    profiled_as: str
    profiler: Any = None
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    loads: list[Tensor] = field(default_factory=list)

    def take(self, trainer: Trainer, batches: Batches, steps: int) -> None:
        import torch

        trainer.parallel_model.train()
        self._note_loads(trainer)
        for step in range(steps):
            torch.cuda.synchronize()
            began = time.monotonic()
            if self.profiled_as and step == 9:
                with torch.profiler.profile() as self.profiler:
                    self.norms.append(trainer._step(batches))
                    torch.cuda.synchronize()
                trace = f"{os.environ.get('OUT', '.')}/{self.profiled_as}.trace.json.gz"
                self.profiler.export_chrome_trace(trace)
            else:
                self.norms.append(trainer._step(batches))
            torch.cuda.synchronize()
            self.seconds.append(time.monotonic() - began)
            self.losses.append(trainer._mean_loss())
            trainer.totals.clear()

    def _note_loads(self, trainer: Trainer) -> None:
        routers = [m for m in trainer.model.modules() if hasattr(m, "local_tokens_per_expert")]
        finalize = trainer.built.config.finalize_model_grads_func

        def with_loads(*args: Any, **kwargs: Any) -> None:
            self.loads[:] = [router.local_tokens_per_expert.clone() for router in routers]
            finalize(*args, **kwargs)

        trainer.built.config.finalize_model_grads_func = with_loads

    def told(self, config: Config, trainer: Trainer) -> dict[str, Any]:
        """Speed, memory of the fullest GPU, losses and loads; every rank asks."""
        from snaketron.model import backend
        from snaketron.sizes.flops import training_flops
        from snaketron.sizes.memory import peak_bytes
        from snaketron.sizes.work import Work

        import torch

        batch, length = config.pretrain.global_batch_size, config.pretrain.seq_length
        gpus = trainer.run.parallel.world_size
        step_s = steady(self.seconds)
        rate = batch * length / step_s / gpus
        peaks = torch.tensor(
            [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()],
            device=backend.device(),
        ).double()
        torch.distributed.all_reduce(peaks, op=torch.distributed.ReduceOp.MAX)
        peak, reserved = (peaks / 2**30).tolist()
        does = Work(config.model, VOCABULARY, length, batch, config.pretrain, trainer.settings.optimizer)
        uneven = [float(load.max() / load.double().mean()) for load in self.loads] or [1.0]
        return {
            "gpu": torch.cuda.get_device_name(),
            "tokens_per_second": rate,
            "tflops": rate * training_flops(config.model, VOCABULARY, length) / 1e12,
            "step_ms": step_s * 1e3,
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "first_step_s": self.seconds[0],
            "seconds": [round(s, 3) for s in self.seconds],
            "gpus": gpus,
            "peak_gib": peak,
            "reserved_gib": reserved,
            "estimate_gib": peak_bytes(does) / 2**30,
            "losses": [round(x, 4) for x in self.losses],
            "norms": [round(float(x), 4) for x in self.norms],
            "load_worst": max(uneven),
            "load_mean": sum(uneven) / len(uneven),
        }


def profiled(rows: list[Any]) -> dict[str, Any]:
    """What took the time, by the rows of a profile."""
    of_kinds = kinds(rows)
    result = {"kinds_ms": of_kinds, "busy_ms": round(sum(of_kinds.values()), 1)}
    for kind, key in (("GPU", "self_device_time_total"), ("CPU", "self_cpu_time_total")):
        top = sorted(rows, key=lambda row: -getattr(row, key))
        total = sum(getattr(row, key) for row in top if kind == "CPU" or not row.cpu_time_total)
        result[f"top {kind}, ms of {total / 1e3:.0f}"] = [
            f"{getattr(row, key) / 1e3:.1f} ({row.count}) {row.key[:90]}"
            for row in top
            if kind == "CPU" or not row.cpu_time_total
        ][:40]
    return result


def ceiling() -> float:
    """TFLOP/s of a large bf16 matrix product on random data."""
    import torch

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for _ in range(5):
        a @ b
    events[0].record()
    for _ in range(30):
        a @ b
    events[1].record()
    torch.cuda.synchronize()
    return 30 * 2 * 8192**3 / events[0].elapsed_time(events[1]) / 1e9


def turn_of(name: str, profile: list[str]) -> Turn:
    """A variant in processes of its own."""
    command = ["-m", "tests.benchmarks.gpu_training", "--one", name, "--profile", *profile]
    return Turn(name, command, lambda text: json.loads(text.strip().rpartition("\n")[2]), gpus(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variants", nargs="*", default=[])
    parser.add_argument("--one", help="measure this variant in this process")
    parser.add_argument("--profile", nargs="*", default=[])
    parser.add_argument("--seconds", type=float, default=540, help="start no variant after this")
    args = parser.parse_args()
    if args.one:
        line = json.dumps(measure(args.one, args.one in args.profile))
        if int(os.environ.get("RANK", 0)) == 0:
            print(line, flush=True)
        return
    import torch

    began, results = time.monotonic(), []
    print(f"matrix ceiling {ceiling():.0f} TFLOP/s", flush=True)
    there = torch.cuda.device_count()
    names = args.variants or [name for name in VARIANTS if gpus(name) <= there]
    out = Path(os.environ.get("OUT", "."))
    for turn, result in take([turn_of(name, args.profile) for name in names], out, args.seconds):
        results.append(result)
        (out / "results.json").write_text(json.dumps(results, indent=1))
        line = json.dumps(result, indent=1 if turn.name in args.profile else None)
        print(f"{time.monotonic() - began:.0f} s", line, flush=True)
    print(
        "| variant | GPUs | tokens/s/GPU | TFLOP/s/GPU | step ms | first s | peak GiB | reserved | "
        "estimate | loss | load, worst, mean |"
    )
    print("|---|" + "--:|" * 10)
    for r in results:
        print(
            f"| {r['name']} | {r['gpus']} | {r['tokens_per_second']:,.0f} | {r['tflops']:.0f} | "
            f"{r['step_ms']:.0f} | {r['first_step_s']:.0f} | {r['peak_gib']:.1f} | {r['reserved_gib']:.1f} | "
            f"{r['estimate_gib']:.1f} | {r['losses'][-1]:.4f} | {r['load_worst']:.2f}, {r['load_mean']:.2f} |"
        )


if __name__ == "__main__":
    main()
