"""Floating-point operations that a token needs by the mathematics, however kernels compute it."""

from __future__ import annotations

from snaketron.config import Model
from snaketron.sizes.parameters import expert_parameters, expert_width, mamba_widths, padded_vocab_size


def layer_flops(model: Model, layer: str, seq_length: float) -> float:
    """Model FLOPs of the forward pass of a layer for one token.

    Counted are matrix products, 2 a weight that the token meets, and

    - M: the recurrence of the state, 7 x inner x state_dim as in Megatron-LM (num_floating_point_operations
      of megatron/training/training.py): decay, outer product, sum and product with C, however the
      kernel computes them;
    - `*`: scores and their product with the values, 2 x 2 x heads x kv_channels for each key that a token
      sees; under the causal mask that is half of the sequence on average.

    Not counted: norms, activations, convolutions (under 1 %), recomputation.

    Args:
        seq_length: tokens of a sequence (packed: the mean over tokens of their sequence's length).
    """
    hidden = model.hidden_size
    if layer == "M":
        inner, conv = mamba_widths(model)
        projections = hidden * (inner + conv + model.mamba_num_heads) + inner * hidden
        return 2 * projections + 7 * inner * model.mamba_state_dim
    if layer == "*":
        queries = model.num_attention_heads * model.kv_channels
        keys_values = 2 * model.num_query_groups * model.kv_channels
        return 2 * hidden * (2 * queries + keys_values) + 4 * queries * seq_length / 2
    if layer == "-":
        return 4 * hidden * model.ffn_hidden_size
    projections = 2 * hidden * expert_width(model) if model.moe_latent_size else 0
    router, shared = hidden * model.num_moe_experts, 2 * hidden * model.moe_shared_expert_intermediate_size
    return 2 * (router + projections + shared + model.moe_router_topk * expert_parameters(model))


def training_flops(model: Model, vocab_size: int, seq_length: float, *, frozen: bool = False) -> float:
    """Model FLOPs of training on one token: three times those of the forward pass.

    For each product of the forward pass, the backward pass has one for the gradient of the weights, unless
    these are `frozen`, and one for the gradient of the input. The output layer counts once, and once more for
    each depth of multi-token prediction.
    """
    hidden = model.hidden_size
    output = 2 * hidden * padded_vocab_size(model, vocab_size, 1)
    forward = output + sum(layer_flops(model, layer, seq_length) for layer in model.hybrid_layer_pattern)
    depth: float = 2 * 2 * hidden * hidden + output
    depth += sum(layer_flops(model, layer, seq_length) for layer in model.mtp_hybrid_layer_pattern)
    return (2 if frozen else 3) * (forward + model.mtp_num_layers * depth)
