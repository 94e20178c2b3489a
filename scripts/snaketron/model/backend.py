"""The machine under the model: a GPU, or a CPU that stands in for one.

With a GPU, Transformer Engine and mamba-ssm do the work. Without one, `megatron.cpu` and
`megatron.cpu_layers` stand in for the few pieces that need a GPU. Training code asks this module for what
differs and never which of the two it runs on.
"""

from __future__ import annotations

import os
import resource
import sys
from typing import Any

from snaketron.config import Model, Optimizer
from snaketron.log import UserError
from snaketron.model.megatron import quiet, replacements
from snaketron.settings.training import RunSettings
from snaketron.sizes.layout import layout

import torch

HAS_GPU = torch.cuda.is_available()

MACHINE: replacements.Machine = "GPU" if HAS_GPU else "CPU"

quiet.silence()
if HAS_GPU:
    from snaketron.model.megatron import gpu

    gpu.set_environment()
replacements.prepare(MACHINE)
if not HAS_GPU and "megatron.core" in sys.modules:
    torch.compiler.set_stance("force_eager")  # too late to leave the compiler out, not to leave it unused
with quiet.light_import():
    if HAS_GPU:
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as _stack_spec
    else:
        from snaketron.model.megatron.cpu import keep_freed_memory
        from snaketron.model.megatron.cpu_layers import hybrid_stack_spec as _stack_spec

        keep_freed_memory()
    from megatron.core.transformer.spec_utils import ModuleSpec


def hybrid_stack_spec() -> ModuleSpec:
    """The modules that a HybridModel is built from."""
    return _stack_spec


def check(model: Model, run: RunSettings, optimizer: Optimizer | None = None) -> None:
    """Refuse what this machine cannot do; `UserError`. Without an optimizer the model is not trained."""
    problems = []
    if HAS_GPU:
        major, minor = torch.cuda.get_device_capability()
        needed = {"fp8": (8, 9), "nvf": (10, 0)}.get(model.precision[:3], (0, 0))
        if (major, minor) < needed:
            others = "bf16 or an fp8 precision" if major >= 9 else "bf16"
            problems.append(
                f"model.precision: {model.precision} needs a GPU of compute capability "
                f"{needed[0]}.{needed[1]}, and this {torch.cuda.get_device_name()} has {major}.{minor}; "
                f"choose {others}"
            )
        if model.precision == "fp32" and run.parallel.context_parallel_size > 1:
            problems.append(
                f"parallel.context_parallel_size {run.parallel.context_parallel_size} needs bf16 on GPUs: "
                "Transformer Engine has no attention in fp32 that shares a sequence; set model.precision"
            )
    else:
        keys = {
            "model.precision": model.precision if model.precision not in ("fp32", "bf16") else "",
            "optimizer.moment_precision": "bf16"
            if optimizer and optimizer.moment_precision == "bf16"
            else "",
            "cuda_graphs": run.cuda_graphs or "",
            "offload_optimizer": (optimizer and run.offload_optimizer) or "",
            "recompute": "layernorm" if "layernorm" in run.recompute else "",  # by Transformer Engine
        }
        problems += [
            f"{key}: {value} needs a GPU, and this machine has none" for key, value in keys.items() if value
        ]
    if problems:
        raise UserError("\n".join(problems))


def cuda_graph_options(run: RunSettings) -> dict[str, Any]:
    """TransformerConfig fields that record layers as CUDA graphs."""
    return dict(gpu.CUDA_GRAPHS) if run.cuda_graphs else {}


def fuses_step(model: Model, optimizer: Optimizer, run: RunSettings) -> bool:
    """Whether `adam.FusedStep` takes the optimizer's step: with gradients and moments in bf16, on a GPU."""
    in_bf16 = optimizer.gradient_precision == optimizer.moment_precision == "bf16"
    return HAS_GPU and in_bf16 and model.precision != "fp32" and not run.offload_optimizer


def fuse_step(model: Any, optimizer: Any, clip_grad: float) -> None:
    """Give the step of this optimizer to `adam.FusedStep`; its own configuration must not clip."""
    from snaketron.model.megatron.adam import FusedStep

    FusedStep(model, optimizer, clip_grad)


def data_parallel_options(run: RunSettings) -> dict[str, Any]:
    """DistributedDataParallelConfig fields: whether gradients are summed while others are still computed.

    They are between nodes. Between two H100s linked by NVLink the sums are quick and slow down what computes:
    a step of one micro-batch took 445 ms, and 433 ms where the sums wait for its end.
    """
    copies = run.parallel.data_parallel_size * run.parallel.context_parallel_size
    several_nodes = layout(run, run.cluster).nodes > 1
    return {"overlap_grad_reduce": HAS_GPU and copies > 1 and several_nodes and not run.cuda_graphs}


def packed_options() -> dict[str, Any]:
    """TransformerConfig fields for batches with padding."""
    return dict(gpu.PACKED) if HAS_GPU else {}


def prepare_model(model: torch.nn.Module) -> None:
    """What a new model needs on this machine before it is wrapped."""
    if HAS_GPU:
        gpu.prepare_model(model)


def device() -> torch.device:
    """Where this process computes: its own GPU (by LOCAL_RANK, which is made current), or the CPU."""
    if not HAS_GPU:
        return torch.device("cpu")
    found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(found)
    return found


def memory() -> dict[str, float]:
    """The peak of this process since its start, in GiB.

    With a GPU it is that of its memory, in tensors and as reserved for them; without one, of the host's.
    """
    if not HAS_GPU:
        return {"peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}
    return {
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
    }


def process_group_backend() -> str:
    """What processes talk through: the name `torch.distributed.init_process_group` takes."""
    return "nccl" if HAS_GPU else "gloo"


def transformer_config_options() -> dict[str, Any]:
    """TransformerConfig fields for kernels that only a GPU has; they change speed, not the mathematics."""
    return dict(gpu.TRANSFORMER_CONFIG) if HAS_GPU else {}
