"""Import megatron-core without what is not used of it, and leave out messages that no user can act on."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

# The logger, and how its message begins.
_NOISE = {
    # A CUDA toolkit on a machine without a GPU.
    "torch.utils.cpp_extension": ("No CUDA runtime is found",),
    "torch.utils.flop_counter": ("triton not found",),
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
    # Older versions had some; this one gives the losses of the native one (docs/measurements.md).
    "Transformer Engine cross entropy loss fusion has known stability issues",
    "full scope is deprecated",  # raised by TransformerConfig for its own default
    "MimoModelConfig is experimental",  # a model that is not used here
    "The .grad attribute of a Tensor that is not a leaf",  # the distributed optimizer looks, and knows why
)


def silence() -> None:
    """Leave the messages above out, for the life of this process."""
    for name in _NOISE:
        logging.getLogger(name).addFilter(_is_news)
    for message in _NOISY_WARNINGS:
        warnings.filterwarnings("ignore", message)


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_NOISE[record.name])


def paged_stash() -> ModuleType:
    """The names of megatron-core's kernels that spill tokens of experts to the host, which nobody calls."""
    module = ModuleType("megatron.core.transformer.moe.ops.paged_stash")
    names = ("GLOBAL_BLOCK_SIZE", "paged_stash_copy_kernel", "paged_stash_pop_kernel")
    vars(module).update(dict.fromkeys(names))
    return module


def mamba_models() -> ModuleType:
    """The name that importing mamba-ssm looks up in its language models, which nobody uses."""
    module = ModuleType("mamba_ssm.models.mixer_seq_simple")
    vars(module).update(MambaLMHeadModel=None)
    return module


def _no_compile(function: Any = None, **_: Any) -> Any:
    return function if function is not None else (lambda f: f)


# What megatron-core imports for its timers, which are not used, and does without where it is not installed.
_UNUSED = ("wandb", "torch.utils.tensorboard")


@contextlib.contextmanager
def light_import() -> Iterator[None]:
    """Import torch and megatron-core in this block without their warnings and what is not used of them.

    Python's garbage collector rests meanwhile, and passes over what is there at the end of the block for
    ever: looking at a million objects took a third of a program's start and end, 1.9 s of 6.3.
    """
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        if gc.isenabled():
            stack.callback(gc.enable)
            gc.disable()
        warnings.simplefilter("ignore")
        import torch

        if not torch.cuda.is_available():
            # Each `@torch.compile` would import the compiler (5 s) and compile when first called (minutes).
            stack.enter_context(mock.patch.object(torch, "compile", _no_compile))
        stack.enter_context(_absent(*_UNUSED))
        yield
        gc.freeze()


@contextlib.contextmanager
def _absent(*modules: str) -> Iterator[None]:
    """Make importing these modules an ImportError, where they are not imported yet."""
    absent = [name for name in modules if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
