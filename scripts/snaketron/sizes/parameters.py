"""How many parameters a model has, and what divides them among processes.

The numbers are those of the models that megatron-core builds; tests compare with such models.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from snaketron.config import Adapters, Model, Parallel
from snaketron.config.linears import Linear, linears, targeted

CONV_WIDTH = 4  # of Mamba-2's convolution, megatron-core's d_conv


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, by what divides them among the processes of a pipeline stage."""

    tensor: int = 0  # by tensor parallelism
    replicated: int = 0  # by nothing
    expert: int = 0  # routed experts, by expert and expert tensor parallelism

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(
            self.tensor + other.tensor, self.replicated + other.replicated, self.expert + other.expert
        )

    def __mul__(self, times: int) -> Parameters:
        return Parameters(self.tensor * times, self.replicated * times, self.expert * times)

    @property
    def total(self) -> int:
        return self.tensor + self.replicated + self.expert

    def dense_of_process(self, parallel: Parallel) -> int:
        """Parameters that one process holds, without routed experts."""
        return self.tensor // parallel.tensor_model_parallel_size + self.replicated

    def expert_of_process(self, parallel: Parallel) -> int:
        """Parameters of routed experts that one process holds."""
        return self.expert // (parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size)

    def of_process(self, parallel: Parallel) -> int:
        return self.dense_of_process(parallel) + self.expert_of_process(parallel)


def pipeline_pattern(pattern: str, stages: int) -> str:
    """The layer pattern with `|` between pipeline stages of equal length.

    Where the layers do not divide evenly, the first stages get one more: the last one has the output
    layer and multi-token prediction to compute as well.

    >>> pipeline_pattern("MEM*EME", 2)
    'MEM*|EME'

    Raises:
        ValueError: fewer layers than stages.
    """
    if stages > len(pattern):
        raise ValueError(
            f"model.hybrid_layer_pattern {pattern!r} has {len(pattern)} layers, "
            f"too few for pipeline_model_parallel_size {stages}"
        )
    size, extra = divmod(len(pattern), stages)
    cuts = [stage * size + min(stage, extra) for stage in range(stages + 1)]
    return "|".join(pattern[start:end] for start, end in itertools.pairwise(cuts))


def padded_vocab_size(model: Model, vocab_size: int, tensor_parallel_size: int) -> int:
    """Rows of the embedding: the next multiple of make_vocab_size_divisible_by and of the TP size."""
    multiple = math.lcm(model.make_vocab_size_divisible_by, tensor_parallel_size)
    return math.ceil(vocab_size / multiple) * multiple


def layer_parameters(model: Model, layer: str) -> Parameters:
    """Parameters of a layer, by its letter in the pattern, with the norm before it."""
    hidden = model.hidden_size
    if layer == "M":
        inner, conv = mamba_widths(model)
        heads = model.mamba_num_heads
        in_proj, out_proj = hidden * (inner + conv + heads), inner * hidden
        convolution, gated_norm, dt_bias_a_d = conv * (CONV_WIDTH + 1), inner, 3 * heads
        return Parameters(in_proj + out_proj + convolution + gated_norm + dt_bias_a_d, hidden)
    if layer == "*":
        queries = model.num_attention_heads * model.kv_channels
        keys_values = 2 * model.num_query_groups * model.kv_channels
        return Parameters(hidden * (2 * queries + keys_values), hidden)
    if layer == "-":
        return Parameters(2 * hidden * model.ffn_hidden_size, hidden)
    experts, latent = model.num_moe_experts, expert_width(model)
    projections = 2 * hidden * latent if model.moe_latent_size else 0
    return Parameters(
        tensor=2 * hidden * model.moe_shared_expert_intermediate_size,
        replicated=hidden * experts + projections + hidden,
        expert=experts * expert_parameters(model),
    )


def mtp_parameters(model: Model) -> Parameters:
    """Parameters of multi-token prediction: one block, whatever the number of depths."""
    if not model.mtp_num_layers:
        return Parameters()
    hidden = model.hidden_size
    joined = Parameters(2 * hidden * hidden, 3 * hidden)  # eh_proj; enorm, hnorm and the final norm
    return joined + _of_layers(model, model.mtp_hybrid_layer_pattern)


def stage_parameters(model: Model, vocab_size: int, parallel: Parallel) -> list[Parameters]:
    """Parameters of each pipeline stage.

    The first one holds the embedding. The last one holds the final norm, the output layer and
    multi-token prediction, which needs the embedding too: with several stages it holds a copy.
    """
    stages = pipeline_pattern(model.hybrid_layer_pattern, parallel.pipeline_model_parallel_size).split("|")
    found = [_of_layers(model, stage) for stage in stages]
    table = Parameters(
        padded_vocab_size(model, vocab_size, parallel.tensor_model_parallel_size) * model.hidden_size
    )
    found[0] += table
    found[-1] += table + Parameters(replicated=model.hidden_size) + mtp_parameters(model)
    if model.mtp_num_layers and len(stages) > 1:
        found[-1] += table
    return found


def num_parameters(model: Model, vocab_size: int) -> Parameters:
    """Parameters of the whole model: embedding, layers, final norm, output layer, multi-token prediction."""
    return stage_parameters(model, vocab_size, Parallel())[0]


def num_active_parameters(model: Model, vocab_size: int) -> int:
    """Parameters that a token meets in the decoder, with `moe_router_topk` of the routed experts.

    Multi-token prediction is left out: only training has it.
    """
    layers = _of_layers(model, model.hybrid_layer_pattern)
    idle = model.num_moe_experts - model.moe_router_topk
    unused = model.hybrid_layer_pattern.count("E") * idle * expert_parameters(model)
    tables = 2 * padded_vocab_size(model, vocab_size, 1) * model.hidden_size
    return layers.total - unused + tables + model.hidden_size


def adapter_parameters(model: Model, parallel: Parallel, adapters: Adapters) -> list[Parameters]:
    """Parameters of the adapters of each pipeline stage: A (rank, inputs) and B (outputs, rank) of a layer.

    Tensor parallelism divides A or B: the one with the axis that is divided in the layer itself.
    """
    stages = pipeline_pattern(model.hybrid_layer_pattern, parallel.pipeline_model_parallel_size).split("|")
    of_layer = {
        letter: _adapters(linears(model, letter, with_mtp=False), adapters, parallel)
        for letter in set(model.hybrid_layer_pattern)
    }
    found = [_sum(of_layer[letter] * count for letter, count in Counter(stage).items()) for stage in stages]
    found[-1] += _adapters(linears(model, "", with_mtp=True), adapters, parallel)
    return found


def _adapters(there: list[Linear], adapters: Adapters, parallel: Parallel) -> Parameters:
    return _sum(_adapter(linear, adapters, parallel) for linear in targeted(adapters.target_modules, there))


def _adapter(linear: Linear, adapters: Adapters, parallel: Parallel) -> Parameters:
    if linear.experts:
        rank = adapters.expert_rank or adapters.rank
        whole = linear.inputs if linear.parallel == "column" else linear.outputs
        divided = linear.inputs + linear.outputs - whole
        # Each process of expert tensor parallelism holds the whole of the other matrix.
        return Parameters(
            expert=linear.experts * rank * (divided + whole * parallel.expert_tensor_parallel_size)
        )
    a, b = adapters.rank * linear.inputs, adapters.rank * linear.outputs
    if linear.parallel == "replicated":
        return Parameters(replicated=a + b)
    return Parameters(b, a) if linear.parallel == "column" else Parameters(a, b)


def mamba_widths(model: Model) -> tuple[int, int]:
    """Channels of x (and of z), and of x, B and C together."""
    inner = model.mamba_num_heads * model.mamba_head_dim
    return inner, inner + 2 * model.mamba_num_groups * model.mamba_state_dim


def expert_width(model: Model) -> int:
    return model.moe_latent_size or model.hidden_size


def expert_parameters(model: Model) -> int:
    return 2 * expert_width(model) * model.moe_ffn_hidden_size


def _of_layers(model: Model, pattern: str) -> Parameters:
    return _sum(layer_parameters(model, layer) * count for layer, count in Counter(pattern).items())


def _sum(parameters: Iterable[Parameters]) -> Parameters:
    return sum(parameters, Parameters())
