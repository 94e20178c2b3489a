"""How many parameters a model has, and what divides them among processes.

The numbers are those of the models that megatron-core builds; tests compare with such models.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from snaketron.config import Model, Parallel

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
        """Parameters that one process holds."""
        return self.dense_of_process(parallel) + self.expert_of_process(parallel)


def padded_vocab_size(model: Model, vocab_size: int, tensor_parallel_size: int) -> int:
    """Rows of the embedding: the next multiple of make_vocab_size_divisible_by and of the TP size."""
    multiple = math.lcm(model.make_vocab_size_divisible_by, tensor_parallel_size)
    return math.ceil(vocab_size / multiple) * multiple


def weight_bytes(model: Model) -> int:
    """Bytes of a weight, and of a number between layers: bf16, unless the model is in fp32."""
    return 4 if model.precision == "fp32" else 2


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
    return joined + of_layers(model, model.mtp_hybrid_layer_pattern)


def num_parameters(model: Model, vocab_size: int) -> Parameters:
    """Parameters of the whole model: embedding, layers, final norm, output layer, multi-token prediction."""
    tables = Parameters(2 * padded_vocab_size(model, vocab_size, 1) * model.hidden_size)
    final_norm = Parameters(replicated=model.hidden_size)
    return of_layers(model, model.hybrid_layer_pattern) + tables + final_norm + mtp_parameters(model)


def num_active_parameters(model: Model, vocab_size: int) -> int:
    """Parameters that a token meets in the decoder, with `moe_router_topk` of the routed experts.

    Multi-token prediction is left out: only training has it.
    """
    layers = of_layers(model, model.hybrid_layer_pattern)
    idle = model.num_moe_experts - model.moe_router_topk
    unused = model.hybrid_layer_pattern.count("E") * idle * expert_parameters(model)
    tables = 2 * padded_vocab_size(model, vocab_size, 1) * model.hidden_size
    return layers.total - unused + tables + model.hidden_size


def mamba_widths(model: Model) -> tuple[int, int]:
    """Channels of x (and of z), and of x, B and C together."""
    inner = model.mamba_num_heads * model.mamba_head_dim
    return inner, inner + 2 * model.mamba_num_groups * model.mamba_state_dim


def expert_width(model: Model) -> int:
    """Channels that routed experts read and write."""
    return model.moe_latent_size or model.hidden_size


def expert_parameters(model: Model) -> int:
    """Parameters of one routed expert."""
    return 2 * expert_width(model) * model.moe_ffn_hidden_size


def of_layers(model: Model, pattern: str) -> Parameters:
    """Parameters of the layers of a pattern."""
    counts = Counter(pattern).items()
    return sum((layer_parameters(model, layer) * count for layer, count in counts), Parameters())
