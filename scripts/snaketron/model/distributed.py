"""Join the processes that share a model, to train it, to evaluate it or to have it answer."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import re
from collections.abc import Iterator
from datetime import timedelta

from snaketron.log import UserError
from snaketron.model import backend
from snaketron.settings.training import RunSettings

import torch
from megatron.core import parallel_state, tensor_parallel

OTHERS = 0.1  # of a GPU, outside of torch's allocator
GRACE_S = 60  # for the supervisor, which kills processes after `step_timeout`


class OutOfMemory(Exception):
    """The memory of a GPU does not suffice."""


@contextlib.contextmanager
def distributed(
    seed: int, run: RunSettings, *, recorded: bool = False, smaller: str = "larger parallel sizes"
) -> Iterator[None]:
    """Join the other processes, and set up megatron-core's groups and random numbers; leave them at the end.

    After an error on several GPUs they are not left, and the process should end at once (`launch.telling`).
    `recorded`: whole micro-batches will be recorded (`backend.records_micro_batches`).
    `smaller`: what would take less memory of a GPU, for the message where it does not suffice.
    Raises `UserError` when the processes or GPUs that the configuration asks for are not there.
    """
    _check(run)
    torch.set_num_threads(run.cpus_per_task)
    backend.device()  # makes this process' GPU the current one
    if recorded:
        backend.use_recordable_stream()
    _join(run)
    parallel_state.initialize_model_parallel(
        run.parallel.tensor_model_parallel_size,
        run.parallel.pipeline_model_parallel_size,
        context_parallel_size=run.parallel.context_parallel_size,
        expert_model_parallel_size=run.parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=run.parallel.expert_tensor_parallel_size,
        distributed_timeout_minutes=_timeout(run) / timedelta(minutes=1),
    )
    torch.manual_seed(seed)
    # Transformer Engine's tracker of random numbers is the one that can be recorded.
    te_rng_tracker = recorded or bool(run.cuda_graphs)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, te_rng_tracker=te_rng_tracker)
    try:
        with _explained(run, smaller):
            yield
    except BaseException:
        if not (backend.HAS_GPU and run.parallel.world_size > 1):
            _leave()
        # else NCCL would wait here for the others, which wait for this process: it ends, and they are ended
        raise
    _leave()


def _check(run: RunSettings) -> None:
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world != run.parallel.world_size:
        raise UserError(
            f"{world} processes were started, and the parallel sizes of the configuration want "
            f"{run.parallel.world_size}"
        )
    if run.cluster.gpus_per_node and not backend.HAS_GPU:
        raise UserError(
            f"cluster.gpus_per_node is {run.cluster.gpus_per_node} and torch sees no GPU on "
            f"{platform.node()}: look at nvidia-smi there, and whether this torch has CUDA; 0 trains on CPUs"
        )
    if backend.HAS_GPU and backend.gpu_number() >= (there := torch.cuda.device_count()):
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") or "not set"
        raise UserError(
            f"{platform.node()}: torch sees {there} of its GPUs, and this is process "
            f"{backend.gpu_number() + 1} there (CUDA_VISIBLE_DEVICES is {hidden}): each needs one; look at "
            "nvidia-smi there, cluster.gpus_per_node and the parallel sizes"
        )


@contextlib.contextmanager
def _explained(run: RunSettings, smaller: str) -> Iterator[None]:
    """Say of a GPU without memory what it computes and what to change; numbers are in the traceback."""
    try:
        yield
    except Exception as error:
        if not _is_without_memory(error):
            raise
        stages = run.parallel.pipeline_model_parallel_size
        stage = f" for stage {parallel_state.get_pipeline_model_parallel_rank() + 1} of {stages}"
        where = f"a GPU has too little memory{stage if stages > 1 else ''}"
        raise OutOfMemory(f"{where}{_taken_by_others()}; it needs less with {smaller}") from error


def _is_without_memory(error: BaseException | None) -> bool:
    """Whether torch's allocator, CUDA, Triton or NCCL says so, of this error or of one that led to it."""
    words = r"cuda.{0,15}out of memory"
    while error and not re.search(words, str(error), re.IGNORECASE):
        error = error.__cause__ or error.__context__
    return error is not None


def _taken_by_others() -> str:
    """How much of this GPU other programs have, where that is much."""
    with contextlib.suppress(RuntimeError):  # after an error of CUDA it says nothing any more
        free, total = torch.cuda.mem_get_info() if backend.HAS_GPU else (0, 0)
        others = total - free - torch.cuda.memory_reserved()
        if others > OTHERS * total:  # what libraries have is less
            return f" (other programs have {others / 2**30:.0f} GiB of it: nvidia-smi names them)"
    return ""


def _leave() -> None:
    _destroy_recordings()
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def _destroy_recordings() -> None:
    """Destroy what was recorded: NCCL waits for ever to leave a group of which a CUDA graph has an operation.

    Those of attention and Mamba layers under tensor parallelism have. What Python's garbage collector was
    told to skip (`loop.freeze`) it does not list either, until it is thawed. A graph that a GPU still
    computes goes when that has ended, and NCCL waits for it.
    """
    if torch.cuda.is_initialized():
        gc.unfreeze()
        for graph in [found for found in gc.get_objects() if type(found) is torch.cuda.CUDAGraph]:
            graph.reset()


def _join(run: RunSettings) -> None:
    name, timeout = backend.process_group_backend(), _timeout(run)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        torch.distributed.init_process_group(name, timeout=timeout)
    else:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(name, timeout=timeout, store=store, rank=0, world_size=1)


def _timeout(run: RunSettings) -> timedelta:
    """How long a process waits for another one: longer than the supervisor, which knows what they are at.

    NCCL's own 10 minutes are short for who has written its part of a large checkpoint, and waits for others.
    """
    return timedelta(seconds=run.step_timeout + GRACE_S)
