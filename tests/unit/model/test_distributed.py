"""What is checked before the processes of a model are joined."""

import gc

import snaketron.model  # noqa: F401  before megatron
from snaketron.config import Cluster, Parallel
from snaketron.log import UserError
from snaketron.model import backend
from snaketron.model.distributed import distributed
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
