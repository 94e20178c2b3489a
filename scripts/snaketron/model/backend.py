"""The machine under the model: a GPU, or a CPU that stands in for one.

With a GPU, Transformer Engine and mamba-ssm do the work and nothing here changes torch or
megatron-core. Without one, `snaketron.model.cpu` replaces the few pieces that need a GPU. Training code
asks this module for what differs and never which of the two it runs on.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import sys
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

from snaketron.config import Model, Optimizer
from snaketron.log import UserError
from snaketron.settings.training import RunSettings
from snaketron.sizes.layout import layout

import torch

HAS_GPU = torch.cuda.is_available()

# What a user can do nothing about: the logger, and how its message begins.
_NOISE = {
    # A CUDA toolkit on a machine without a GPU.
    "torch.utils.cpp_extension": ("No CUDA runtime is found",),
    # It is computed inside instead, with the same result.
    "megatron.core.distributed.distributed_data_parallel": ("DistributedDataParallel: full_param_layout",),
    # What it recommends is one more dependency (nvidia-resiliency-ext).
    "megatron.core.dist_checkpointing.strategies.torch": ("MCore's async save is deprecated",),
    "megatron.core.rerun_state_machine": (
        "Implicit initialization",
        "RerunStateMachine initialized in mode RerunMode.DISABLED",
    ),
    # On a CPU one generator plays both parts.
    "megatron.core.tensor_parallel.random": ("CPU RNG state changed within GPU RNG context",),
}


_NOISY_WARNINGS = (
    # Of earlier versions; ours gives the losses of the native one (docs/measurements.md).
    "Transformer Engine cross entropy loss fusion has known stability issues",
    "full scope is deprecated",  # raised by TransformerConfig for its own default
    "MimoModelConfig is experimental",  # a model that we do not use
    "The .grad attribute of a Tensor that is not a leaf",  # the distributed optimizer looks, and knows why
)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NOISE[record.name])


def _silence() -> None:
    for name in _NOISE:
        logging.getLogger(name).addFilter(_is_news)
    for message in _NOISY_WARNINGS:
        warnings.filterwarnings("ignore", message)


def _no_compile(function: Any = None, **_: Any) -> Any:
    return function if function is not None else (lambda f: f)


@contextlib.contextmanager
def _light_import() -> Iterator[None]:
    """Import megatron-core without its warnings and without what we do not use of it."""
    without_wandb = "wandb" not in sys.modules
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        if without_wandb:
            sys.modules["wandb"] = None  # type: ignore[assignment]  # 1 s, for a writer in megatron.core.timers
        if not HAS_GPU:
            # Each `@torch.compile` would import the compiler (5 s) and compile when first called (minutes).
            stack.enter_context(mock.patch.object(torch, "compile", _no_compile))
        try:
            yield
        finally:
            if without_wandb:
                del sys.modules["wandb"]


# Packages of the GPU that megatron-core would use as soon as they are installed.
_GPU_PACKAGES = ("transformer_engine", "mamba_ssm", "causal_conv1d")

_silence()
if HAS_GPU:
    from snaketron.model.megatron import gpu

    gpu.prepare()
else:
    for package in _GPU_PACKAGES:
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # importing it is an ImportError
if not HAS_GPU and "megatron.core" in sys.modules:
    torch.compiler.set_stance("force_eager")  # too late to leave the compiler out, not to leave it unused
with _light_import():
    if HAS_GPU:
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as _stack_spec
    else:
        from snaketron.model.megatron.cpu import hybrid_stack_spec as _stack_spec
    from megatron.core.transformer.spec_utils import ModuleSpec

if HAS_GPU:
    gpu.patch()


def hybrid_stack_spec() -> ModuleSpec:
    """The modules that a HybridModel is built from."""
    return _stack_spec


def check(model: Model, optimizer: Optimizer, run: RunSettings) -> None:
    """Refuse what this machine cannot do; `UserError`."""
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
            "optimizer.moment_precision": "bf16" if optimizer.moment_precision == "bf16" else "",
            "cuda_graphs": run.cuda_graphs or "",
            "offload_optimizer": run.offload_optimizer or "",
            "recompute": "layernorm" if "layernorm" in run.recompute else "",  # by Transformer Engine
        }
        problems += [
            f"{key}: {value} needs a GPU, and this machine has none" for key, value in keys.items() if value
        ]
    if problems:
        raise UserError("\n".join(problems))


def cuda_graph_options(run: RunSettings) -> dict[str, Any]:
    """TransformerConfig fields of recorded layers."""
    return dict(gpu.CUDA_GRAPHS) if run.cuda_graphs else {}


def data_parallel_options(run: RunSettings) -> dict[str, Any]:
    """DistributedDataParallelConfig fields: whether gradients are summed while others are still computed.

    Between nodes. Between two H100s linked by NVLink a step of one micro-batch took 445 ms so, and 433 where
    the sums wait for its end: they are quick there, and take from what computes.
    """
    copies = run.parallel.data_parallel_size * run.parallel.context_parallel_size
    several_nodes = layout(run, run.cluster).nodes > 1
    return {"overlap_grad_reduce": HAS_GPU and copies > 1 and several_nodes and not run.cuda_graphs}


@contextlib.contextmanager
def without_recordings() -> Iterator[None]:
    """Compute recorded layers anew, for a validation: what was recorded was trained on."""
    from megatron.core.transformer.cuda_graphs import _CudagraphGlobalRecord as Record

    before, Record.cudagraph_created = Record.cudagraph_created, False
    try:
        yield
    finally:
        Record.cudagraph_created = before


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
    """Peak of this process since its start, in GiB: of the GPU's memory in tensors and as reserved for them,
    or of the host's where there is no GPU."""
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
