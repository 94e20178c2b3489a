"""One process that plays every rank, and a small model."""

import snaketron.model  # noqa: F401  before megatron
from snaketron.config import Model, Parallel
from snaketron.model import backend, spec
from tests.unit.sizes.models import SMALL

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, MTPLossLoggingHelper


@pytest.fixture(scope="module", autouse=True)
def one_process():
    """A process group of this process alone, as long as the tests of a module run."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend.process_group_backend(), store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors; and threads that wait for each other are slow on a busy machine
    yield
    torch.set_num_threads(num_threads)
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    # megatron-core keeps these for the life of a process, in the shapes of another test's model.
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    MTPLossAutoScaler.main_loss_backward_scale = torch.tensor(1.0)
    destroy_moe_metrics_tracker()
    MTPLossLoggingHelper.tracker.clear()


@pytest.fixture
def build():
    """build(vocab_size, **keys of the configuration) gives a model of one process."""

    def make(vocab_size=256, **keys):
        model = Model(**(SMALL | keys))
        return spec.build_model(
            spec.transformer_config(model, Parallel()), model, Parallel(), vocab_size, 512
        )

    return make
