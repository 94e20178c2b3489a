"""Tests that need GPUs: all of them, in one command, with one process of pytest.

    uv run pytest -n0 tests/gpu

Without a GPU they are skipped. With one GPU the processes of a training share it (tests/gpu/shared).
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

import pytest
import torch

# Without a search for the fastest kernels, which takes a minute or two for each new shape, and with sums in
# one order. Read when the kernels are imported.
UNTUNED = {"MAMBA_DETERMINISTIC": "1", "TRITON_CACHE_AUTOTUNING": "0"}
if torch.cuda.is_available():
    os.environ.update(UNTUNED)

HERE = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = not torch.cuda.is_available()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if absent:
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch sees none"))


@pytest.fixture(autouse=True)
def one_process_of_pytest() -> None:
    if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)) > 1 and torch.cuda.is_available():
        pytest.exit("the GPU tests want the GPUs to themselves: pytest -n0 tests/gpu", returncode=2)


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """This process as the only one of a training."""
    from snaketron.model import backend

    from megatron.core import parallel_state, tensor_parallel

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend.process_group_backend(), store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
