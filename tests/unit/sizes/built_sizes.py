"""One of two processes that build models in several layouts and count what they hold.

    RANK=... WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python -m tests.unit.sizes.built_sizes

prints, as JSON on the first rank, for each layout the numbers of (dense, expert) parameters of both, and of
the adapters of all linear layers.
"""

import json

import snaketron.model  # noqa: F401  before megatron
from snaketron.config import Adapters, Model, Parallel
from snaketron.model import backend, lora, spec

import torch
from megatron.core import parallel_state, tensor_parallel

VOCABULARY = 300
MODEL = Model(mtp_hybrid_layer_pattern="*E")
LAYOUTS = {
    "tp": {"tensor_model_parallel_size": 2},
    "tp, ep": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
    "tp, etp": {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
    "ep": {"expert_model_parallel_size": 2, "data_parallel_size": 2},
    "pp": {"pipeline_model_parallel_size": 2},
    "pp, by layers": {"pipeline_model_parallel_size": 2, "pipeline_split": "layers"},
    "cp": {"context_parallel_size": 2},
}


ADAPTERS = Adapters(rank=3, expert_rank=2, target_modules=["linear_*", "*_proj", "router"])


def built(model: Model, parallel: Parallel) -> list[int]:
    """Parameters, dense and of experts, that this process builds, and then of the adapters alone."""
    parallel_state.initialize_model_parallel(
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    module = spec.build_model(spec.transformer_config(model, parallel), model, parallel, VOCABULARY, 64)
    numbers = [
        sum(p.numel() for n, p in module.named_parameters() if (".experts." in n) is expert)
        for expert in (False, True)
    ]
    lora.add_adapters(module, ADAPTERS, 1)
    trained = {n: p.numel() for n, p in module.named_parameters() if p.requires_grad}
    numbers += [
        sum(number for name, number in trained.items() if (".experts." in name) is expert)
        for expert in (False, True)
    ]
    parallel_state.destroy_model_parallel()
    return numbers


if __name__ == "__main__":
    torch.distributed.init_process_group(backend.process_group_backend())
    found = {}
    for layout, sizes in LAYOUTS.items():
        both: list = [None, None]
        torch.distributed.all_gather_object(both, built(MODEL, Parallel(**sizes)))
        found[layout] = both
    if torch.distributed.get_rank() == 0:
        print(json.dumps(found))
    torch.distributed.destroy_process_group()
