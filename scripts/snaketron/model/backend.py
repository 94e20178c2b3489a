"""The machine under the model: a GPU, or a CPU that stands in for one.

With a GPU, Transformer Engine and mamba-ssm do the work. Without one, `megatron.cpu` and
`megatron.cpu_layers` stand in for the few pieces that need a GPU. Training code asks this module for what
differs and never which of the two it runs on.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any
from unittest import mock

from snaketron.config import Model, Optimizer
from snaketron.config.training_checks import of_gpus
from snaketron.jobs.launch import OF_SRUN
from snaketron.log import UserError
from snaketron.model.megatron import replacements
from snaketron.model.megatron.row import Machine
from snaketron.settings.training import LoraSettings, RunSettings, TrainSettings
from snaketron.sizes.gpus import usable_bytes
from snaketron.sizes.layout import layout
from snaketron.sizes.recording import recordable, records_layers
from snaketron.sizes.work import Work

import torch

HAS_GPU = torch.cuda.is_available()
USABLE = 0.93  # of a GPU's memory, without libraries and what the allocator loses

Schedule = Callable[..., list[Any]]

MACHINE: Machine = "GPU" if HAS_GPU else "CPU"

if HAS_GPU:
    from snaketron.model.megatron import gpu

    gpu.set_environment()
replacements.prepare(MACHINE)
if HAS_GPU:
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as _stack_spec
else:
    if "megatron.core" in sys.modules:
        torch.compiler.set_stance("force_eager")  # too late to leave the compiler out, not to leave it unused
    from snaketron.model.megatron.cpu import keep_freed_memory
    from snaketron.model.megatron.cpu_layers import hybrid_stack_spec as _stack_spec

    keep_freed_memory()
if TYPE_CHECKING:
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
        if absent := absent_dispatcher(run):
            problems.append(absent)
    else:
        problems += [
            f"{'model.' if key == 'precision' else ''}{key}: {value} needs a GPU, and this machine has none"
            for key, value in of_gpus(model, run, optimizer).items()
        ]
    if problems:
        raise UserError("\n".join(problems))


def records_micro_batches(settings: TrainSettings, run: RunSettings) -> bool:
    """Whether the kernels of whole micro-batches are recorded (`megatron.recording`)."""
    adapters = settings.lora if isinstance(settings, LoraSettings) else None
    return (
        HAS_GPU
        and run.cuda_graphs is None
        and recordable(
            *(settings.model, run, settings.seq_length),
            packed=settings.packed,
            adapters=adapters,
            cluster=run.cluster,
        )
    )


def with_recorded_layers(settings: TrainSettings, run: RunSettings, vocab_size: int) -> RunSettings:
    """`run` with layers recorded, where it leaves that to the program (`recording.records_layers`)."""
    if not HAS_GPU or run.cuda_graphs is not None:
        return run
    work = Work(
        settings.model, vocab_size, settings.seq_length, settings.global_batch_size, run, settings.optimizer
    )
    usable = usable_bytes(run.cluster) or USABLE * torch.cuda.get_device_properties(device()).total_memory
    if records_layers(work, packed=settings.packed, cluster=run.cluster, usable=usable):
        return run.model_copy(update={"cuda_graphs": True})
    return run


def use_recordable_stream() -> None:
    """Compute on a stream of our own from here on: nothing on CUDA's default stream can be recorded."""
    torch.cuda.set_stream(torch.cuda.Stream())


def schedule(*, recorded: bool) -> Schedule:
    """What computes the micro-batches of a step, with the arguments of megatron-core's schedules."""
    if recorded:
        from snaketron.model.megatron.recording import Recorder

        return Recorder()
    from megatron.core.pipeline_parallel import get_forward_backward_func

    return get_forward_backward_func()


def absent_dispatcher(run: RunSettings) -> str:
    """Why tokens cannot be dispatched as `run` says, by what megatron-core could import; else empty."""
    from megatron.core.transformer.moe import fused_a2a

    there: dict[str | None, bool] = {"deepep": fused_a2a.HAVE_DEEP_EP, "hybridep": fused_a2a.HAVE_HYBRIDEP}
    if there.get(run.moe_token_dispatcher, True):
        return ""
    branch = " of the branch hybrid-ep" if run.moe_token_dispatcher == "hybridep" else ""
    return (
        f"moe_token_dispatcher: {run.moe_token_dispatcher} needs the package deep_ep{branch}, which is not "
        "installed here: build it for this GPU (docs/gpu.md), or take alltoall"
    )


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


def trusting_extra_state() -> AbstractContextManager[Any]:
    """Let Transformer Engine unpickle the state of its layers, which holds the scales of `fp8_delayed`.

    It refuses to without the variable, since unpickling can run code: only for checkpoints made here.
    """
    return mock.patch.dict(os.environ, NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE="1")


def prepare_model(model: torch.nn.Module) -> None:
    """What a new model needs on this machine before it is wrapped."""
    if HAS_GPU:
        gpu.prepare_model(model)


def device() -> torch.device:
    """Where this process computes: its own GPU (`gpu_number`), which is made current, or the CPU."""
    if not HAS_GPU:
        return torch.device("cpu")
    found = torch.device("cuda", gpu_number())
    torch.cuda.set_device(found)
    return found


def gpu_number() -> int:
    """The number of this process' own GPU, among those that it sees: its number among the node's processes.

    Where Slurm binds a GPU to each process of a job step (`--gpus-per-task`), that is all that it sees.
    """
    if OF_SRUN in os.environ and torch.cuda.device_count() == 1:
        return 0
    return int(os.environ.get("LOCAL_RANK", 0))


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
