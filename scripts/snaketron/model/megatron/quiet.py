"""Import megatron-core without what is not used of it, and leave out messages that no user can act on."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

# The logger, and how its message begins.
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


def _no_compile(function: Any = None, **_: Any) -> Any:
    return function if function is not None else (lambda f: f)


@contextlib.contextmanager
def light_import() -> Iterator[None]:
    """Import megatron-core in this block without its warnings and without what is not used of it."""
    without_wandb = "wandb" not in sys.modules
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        if without_wandb:
            sys.modules["wandb"] = None  # type: ignore[assignment]  # 1 s, for a writer in megatron.core.timers
        if not torch.cuda.is_available():
            # Each `@torch.compile` would import the compiler (5 s) and compile when first called (minutes).
            stack.enter_context(mock.patch.object(torch, "compile", _no_compile))
        try:
            yield
        finally:
            if without_wandb:
                del sys.modules["wandb"]
