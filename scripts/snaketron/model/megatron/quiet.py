"""Import megatron-core without what is not used of it, and leave out messages that no user can act on."""

from __future__ import annotations

import contextlib
import gc
import importlib
import inspect
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


# torch asks `inspect` where each of its operators is defined: there these look at the files of all modules.
_getframeinfo, _getmodule = inspect.getframeinfo, inspect.getmodule


def _position(frame: Any, context: int = 1) -> inspect.Traceback:
    """The file and line of a frame, without lines of source around it."""
    return _getframeinfo(frame, context=0)


def _module(place: Any, *arguments: Any) -> ModuleType | None:
    """The module of a frame by its name."""
    if inspect.isframe(place):
        return sys.modules.get(place.f_globals["__name__"])
    return _getmodule(place, *arguments)


# Modules of which torch and megatron-core import functions that nobody calls on a machine without a GPU, and
# their other names. They import sympy and setuptools, a quarter of all modules.
_LATE: dict[str, dict[str, Any]] = {
    "torch.fx.experimental.symbolic_shapes": {},
    "torch.utils.cpp_extension": {"CUDA_HOME": None},
}


class _Late(ModuleType):
    """Stands for a module of functions, which is imported when one of them is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *given, **named: getattr(importlib.import_module(self.__name__), name)(*given, **named)


# What megatron-core imports for its timers, which are not used, and does without where it is not installed.
_UNUSED = ("wandb", "torch.utils.tensorboard")


@contextlib.contextmanager
def light_import() -> Iterator[None]:
    """Import torch and megatron-core in this block without their warnings and what is not used of them.

    Python's garbage collector rests meanwhile, and passes over what is there at the end of the block for
    ever: looking at a million objects took a third of a program's start and end, 1.9 s of 6.3. What else is
    left out here took a quarter of the rest.
    """
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        if gc.isenabled():
            stack.callback(gc.enable)
            gc.disable()
        warnings.simplefilter("ignore")
        stack.enter_context(mock.patch.multiple(inspect, getframeinfo=_position, getmodule=_module))
        import torch

        if not torch.cuda.is_available():
            # Each `@torch.compile` would import the compiler (5 s) and compile when first called (minutes).
            stack.enter_context(mock.patch.object(torch, "compile", _no_compile))
            stack.enter_context(_instead(dict(map(_late, _LATE))))
        stack.enter_context(_instead(dict.fromkeys(_UNUSED)))
        yield
        gc.freeze()


def _late(name: str) -> tuple[str, ModuleType]:
    module = _Late(name)
    vars(module).update(_LATE[name])
    return name, module


@contextlib.contextmanager
def _instead(modules: dict[str, Any]) -> Iterator[None]:
    """Modules for a block that imports others; None makes importing one an ImportError."""
    new = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(new)
    try:
        yield
    finally:
        for name in new:
            if sys.modules.get(name) is new[name]:
                del sys.modules[name]
