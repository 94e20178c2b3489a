"""What is checked before the processes of a model are joined."""

import gc
import re

import snaketron.model  # noqa: F401  before megatron
from snaketron.config import Cluster, Parallel
from snaketron.jobs.launch import OF_SRUN
from snaketron.log import UserError
from snaketron.model import backend
from snaketron.model.distributed import OutOfMemory, _check, _explained, _taken_by_others, distributed
from snaketron.settings.training import RunSettings
from tests.ranks import on_ranks

import pytest
import torch
from megatron.core import parallel_state


def test_another_number_of_processes_than_the_parallel_sizes_want_is_refused(monkeypatch):
    run = RunSettings(tracking="off", parallel=Parallel(data_parallel_size=2))
    with pytest.raises(UserError) as error, distributed(1, run):
        pass
    assert str(error.value) == (
        "1 processes were started, and the parallel sizes of the configuration want 2"
    )
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"3 processes were started, .* want 2"), distributed(1, run):
        pass


@pytest.mark.skipif(backend.HAS_GPU, reason="where there is a GPU, it is taken")
def test_gpus_that_are_not_there_are_named():
    run = RunSettings(tracking="off", cluster=Cluster(gpus_per_node=1))
    with pytest.raises(UserError, match="gpus_per_node is 1 and torch sees no GPU"), distributed(1, run):
        pass


def test_recordings_are_destroyed_before_groups_are_left(monkeypatch: pytest.MonkeyPatch):
    """Also those that Python's garbage collector skips, as when a process trains a second time."""
    order = []

    class Graph:
        def reset(self) -> None:
            order.append("recording")

    # This process has joined itself already (conftest), and stays so.
    monkeypatch.setattr("snaketron.model.distributed._join", lambda _: None)
    monkeypatch.setattr(parallel_state, "initialize_model_parallel", lambda *_, **__: None)
    monkeypatch.setattr(parallel_state, "destroy_model_parallel", lambda: order.append("groups"))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: order.append("processes"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    graphs = [Graph()]
    with pytest.raises(ZeroDivisionError), distributed(1, RunSettings(tracking="off")):
        gc.freeze()
        graphs.append(Graph())
        assert not order
        _ = 1 / 0
    gc.freeze()  # again, what all tests share (tests/conftest.py)
    assert order == ["recording", "recording", "groups", "processes"]


def _patience(run: RunSettings) -> list[float]:
    """Seconds that this process waits for others: for all, and in groups of megatron-core."""
    with distributed(1, run):
        model, data = parallel_state.get_model_parallel_group(), parallel_state.get_data_parallel_group()
        groups = torch.distributed.group.WORLD, model, data
        return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def test_processes_wait_for_each_other_longer_than_their_supervisor_does():
    """One that has written its part of a checkpoint gave up after 10 minutes, whatever `step_timeout` is."""
    run = RunSettings(tracking="off", step_timeout=7200, parallel=Parallel(data_parallel_size=2))
    assert on_ranks(2, _patience, run) == [[7260.0] * 3] * 2


def _out_of_memory(run: RunSettings, smaller: str) -> str:
    """What the last stage says that has too little memory."""
    try:
        with distributed(1, run, smaller=smaller):
            if parallel_state.is_pipeline_last_stage():
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "the other one has memory"


def test_where_the_memory_of_a_gpu_does_not_suffice_it_says_for_what_and_what_to_change():
    """In words without numbers that differ from time to time: the same failure twice ends a training."""
    run = RunSettings(tracking="off", parallel=Parallel(pipeline_model_parallel_size=2))
    assert on_ranks(2, _out_of_memory, run, "more in sft.recompute")[1] == (
        "OutOfMemory: a GPU has too little memory for stage 2 of 2; it needs less with more in sft.recompute"
    )


@pytest.mark.parametrize(
    "said",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'",
        "Triton Error [CUDA]: out of memory",
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'",
    ],
)
def test_whoever_asks_for_the_memory_the_message_is_the_same(said: str):
    """The recording of a micro-batch ends with an error of its own."""
    run = RunSettings(tracking="off")
    with pytest.raises(OutOfMemory), _explained(run, ""):
        try:
            raise RuntimeError(said)
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")


def test_other_errors_are_left_as_they_are():
    run = RunSettings(tracking="off")
    for said in (
        "illegal memory access",
        "the process that writes it was killed by SIGKILL (out of memory?)",
    ):
        with pytest.raises(RuntimeError, match=f"^{re.escape(said)}$"), _explained(run, ""):
            raise RuntimeError(said)


def test_what_other_programs_have_of_a_gpu_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend, "HAS_GPU", True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 100 << 30)
    for free, said in ((38, ""), (1, " (other programs have 39 GiB of it: nvidia-smi names them)")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free << 30, 140 << 30))
        assert _taken_by_others() == said


def test_a_process_without_a_gpu_of_its_own_is_told_what_there_is(monkeypatch: pytest.MonkeyPatch):
    """CUDA says "invalid device ordinal". Slurm may also show each process of a step its own GPU alone."""
    run = RunSettings(tracking="off", parallel=Parallel(data_parallel_size=2))
    monkeypatch.setattr(backend, "HAS_GPU", True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("CUDA_VISIBLE_DEVICES", "GPU-7d1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"sees 1 of its GPUs, and this is process 2 there .* is GPU-7d1\)"):
        _check(run)
    monkeypatch.setenv(OF_SRUN, "1")
    _check(run)
    assert backend.gpu_number() == 0
