"""One of one or two processes that compute the gradients of all adapters, whole or in parts.

    python -m tests.unit.train.lora_gradients /tmp/whole.pt                              # writes them
    RANK=... WORLD_SIZE=2 ... python -m tests.unit.train.lora_gradients /tmp/whole.pt    # compares

The second prints, as JSON on the first rank, for each layout the largest relative error of a part.
"""

import json
import os
import sys

import snaketron.model  # noqa: F401  before megatron
from snaketron.config import Adapters, load
from snaketron.model import backend, lora
from snaketron.model.initial import draw_parts
from snaketron.settings.training import LoraSettings, run_settings, train_settings
from snaketron.train.build import build_training
from snaketron.train.loop import Trainer
from tests.gpu.worker import BATCH, LENGTH, FixedBatches
from tests.unit.sizes.models import SMALL

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

# Data parallelism divides gradients among its ranks, so layouts without it.
LAYOUTS = {
    "tp, etp": {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
    "tp, ep": {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
    "pp": {"pipeline_model_parallel_size": 2},
}
ONE = {"data_parallel_size": 1}


def shards(trainer: Trainer) -> dict[tuple[str, tuple[int, ...]], ShardedTensor]:
    """This rank's parts of all factors, by name and expert."""
    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = lora.Part(trainer.model, adapters=True).sharded_state_dict(groups)
    apply_factories(state)
    tensors = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
    return {(t.key, tuple(t.global_offset[: t.prepend_axis_num])): t for t in tensors}


def gradients(parallel: dict[str, int]) -> dict[tuple[str, tuple[int, ...]], ShardedTensor]:
    """The same with the gradients of a step as their data, from random A and B."""
    pretrain = {"seq_length": LENGTH, "global_batch_size": BATCH, "micro_batch_size": 2, "cpus_per_task": 1}
    phase = {"name": "one", "tokens": 1000, "blend": [{"corpus": "docs", "weight": 1}]}
    pretrain |= {"phases": [phase], "warmup_tokens": 0, "decay_tokens": 0, "parallel": parallel}
    # A dense layer as well; two stages of the same kinds of layers.
    config = load({"model": SMALL | {"hybrid_layer_pattern": "ME*-ME"}, "pretrain": pretrain}, {})
    settings, run = train_settings(config, "pretrain/one"), run_settings(config, "pretrain/one")
    adapters = Adapters(rank=4, target_modules=["linear_*", "*_proj", "router"])
    trainer = Trainer(build_training(LoraSettings(**settings.model_dump(), lora=adapters), run, 512))
    b = [shard for (key, _), shard in shards(trainer).items() if ".lora.b" in key]

    def draw(_key: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / 10

    draw_parts(b, draw, 1)
    trainer.parallel_model.zero_grad_buffer()
    trainer._forward_backward(FixedBatches(2, settings.model.mtp_num_layers, LENGTH), 0)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(parameter.main_grad)
    return shards(trainer)


def set_up(parallel: dict[str, int]) -> None:
    parallel_state.initialize_model_parallel(
        parallel.get("tensor_model_parallel_size", 1),
        parallel.get("pipeline_model_parallel_size", 1),
        expert_model_parallel_size=parallel.get("expert_model_parallel_size", 1),
        expert_tensor_parallel_size=parallel.get("expert_tensor_parallel_size", 1),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)


def main(path: str) -> None:
    torch.set_num_threads(1)
    if "RANK" not in os.environ:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        set_up(ONE)
        torch.save({name: shard.data.clone() for name, shard in gradients(ONE).items()}, path)
        return
    torch.distributed.init_process_group(backend.process_group_backend())
    whole, found = torch.load(path), {}
    for layout, parallel in LAYOUTS.items():
        set_up(parallel)
        errors = {}
        for name, shard in gradients(parallel).items():
            offsets = shard.global_offset[shard.prepend_axis_num :]
            part = tuple(slice(o, o + n) for o, n in zip(offsets, shard.data.shape, strict=True))
            expected = whole[name]
            error = (shard.data - expected[part]).abs().max() / expected.abs().max().clamp(min=1e-20)
            errors[f"{name[0]} {list(name[1])}"] = error.item()
        both: list = [None, None]
        torch.distributed.all_gather_object(both, errors)
        found[layout] = {name: error for errors in both for name, error in errors.items()}
        parallel_state.destroy_model_parallel()
    if torch.distributed.get_rank() == 0:
        print(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
