"""Join the processes that share a model, to train it, to evaluate it or to have it answer."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
from collections.abc import Iterator
from datetime import timedelta

from snaketron.log import UserError
from snaketron.model import backend
from snaketron.settings.training import RunSettings

import torch
from megatron.core import parallel_state, tensor_parallel

GRACE_S = 60  # for the supervisor, which kills processes after `step_timeout`


@contextlib.contextmanager
def distributed(seed: int, run: RunSettings, *, recorded: bool = False) -> Iterator[None]:
    """Join the other processes, and set up megatron-core's groups and random numbers; leave them at the end.

    After an error on several GPUs they are not left, and the process should end at once (`launch.telling`).
    `recorded`: whole micro-batches will be recorded (`backend.records_micro_batches`).
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
