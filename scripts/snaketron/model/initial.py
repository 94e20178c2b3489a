"""Initial weights that depend on the seed and not on how processes share the model.

megatron-core draws each rank's part from that rank's random numbers, so another layout begins with other
weights. Here each tensor is drawn whole from the seed and its name, from the distribution that
megatron-core uses, and each rank keeps its part.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable

from snaketron.model import backend

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer import TransformerConfig

# Projections into the residual stream start smaller: std / sqrt(layers).
OUTPUT_PROJECTIONS = ("linear_proj", "linear_fc2", "out_proj", "fc2_latent_proj")
# Ranges of megatron-core's MambaMixer, which are those of Mamba-2 (arXiv 2405.21060).
TIME_STEP = (0.001, 0.1)
DECAY = (1.0, 16.0)


@torch.no_grad()
def initialize_weights(model: HybridModel, config: TransformerConfig, seed: int) -> None:
    """Draw all random weights of this rank's part of a new model anew.

    Tensors that begin constant (norms, D, the experts' bias) are left alone. The numbers are drawn on the
    device: a CPU and a GPU begin with other weights.
    """
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}

    def draw_random(key: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return draw(key, shape, config, generator)

    state = model.sharded_state_dict(metadata=metadata)
    apply_factories(state)
    tensors = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
    draw_parts([shard for shard in tensors if not _is_constant(shard)], draw_random, seed)


@torch.no_grad()
def draw_parts(
    shards: Iterable[ShardedTensor],
    draw_whole: Callable[[str, tuple[int, ...], torch.Generator], torch.Tensor],
    seed: int,
) -> None:
    """Fill this rank's parts of tensors that are drawn whole, each from the seed and its name."""
    generator = torch.Generator(backend.device())
    for shard in shards:
        # Leading axes number the experts that share a key: each expert is drawn alone.
        axes = shard.prepend_axis_num
        name = f"{shard.key}{list(shard.global_offset[:axes])}"
        generator.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8]) >> 1)
        whole = draw_whole(shard.key, tuple(shard.global_shape[axes:]), generator)
        offsets = shard.global_offset[axes:]
        part = tuple(slice(o, o + n) for o, n in zip(offsets, shard.data.shape, strict=True))
        shard.data.copy_(whole[part])


def draw(
    key: str, shape: tuple[int, ...], config: TransformerConfig, generator: torch.Generator
) -> torch.Tensor:
    """A whole tensor in float32, from the distribution of its kind."""
    values = torch.empty(shape, dtype=torch.float32, device=generator.device)
    parts = key.split(".")
    if "A_log" in parts:
        return values.uniform_(*DECAY, generator=generator).log_()
    if "dt_bias" in parts:  # so that softplus of it is log-uniform in TIME_STEP
        low, high = map(math.log, TIME_STEP)
        step = values.uniform_(low, high, generator=generator).exp_()
        return step + torch.log(-torch.expm1(-step))
    if "conv1d" in parts:  # torch's default of a depthwise convolution: uniform within 1 / sqrt(width)
        bound = 1 / math.sqrt(4)
        return values.uniform_(-bound, bound, generator=generator)
    std = config.init_method_std
    if parts[-2] in OUTPUT_PROJECTIONS:
        std /= math.sqrt(config.num_layers)
    return values.normal_(0.0, std, generator=generator)


def _is_constant(shard: ShardedTensor) -> bool:
    values = shard.data.flatten()
    return len(values) > 1 and bool((values == values[0]).all())  # a single head's A_log is random, too
