"""What a layer keeps on a GPU for its backward pass; `cpu_activations` says what one keeps on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

from snaketron.config import Model
from snaketron.sizes.parameters import expert_width, mamba_widths

# Positions of a chunk of Mamba's scan, by megatron-core.
CHUNK = 128


def layer_activations(
    model: Model, layer: str, tensor_parallel_size: int, recompute: Sequence[str], keeps_scan: bool = True
) -> float:
    """How many numbers a layer keeps on a GPU for its backward pass, for each token.

    These are the input and the output of the norm, the outputs of projections, and what attention, scan and
    gated norm keep of their own output. Experts keep their input and what is before the activation. Tensor
    parallelism divides all of them, by its sequence parallelism also those of the norm.

    Where `recompute` is empty, Mamba's scan keeps its intermediate results too. mamba-ssm's own does not
    (`keeps_scan` False), and older measurements are of that one.
    """
    hidden = model.hidden_size
    if "layer" in recompute:
        return hidden / tensor_parallel_size
    norm = hidden * (1 if "layernorm" in recompute else 2)
    if layer == "M":
        inner, conv = mamba_widths(model)
        kept: float = norm + (inner + conv + model.mamba_num_heads) + 3 * inner
        if keeps_scan and not recompute:
            kept += _kept_by_scan(model)
    elif layer == "*":
        queries = model.num_attention_heads * model.kv_channels
        keys_values = 2 * model.num_query_groups * model.kv_channels
        kept = norm + 2 * queries + keys_values
    elif layer == "-":
        kept = norm if "mlp" in recompute else norm + 2 * model.ffn_hidden_size
    else:
        shared = 2 * model.moe_shared_expert_intermediate_size
        width = expert_width(model)
        routed = 2 * width + model.moe_router_topk * (width + model.moe_ffn_hidden_size)
        if "moe" in recompute:
            shared = routed = 0
        kept = norm + (0 if "shared_experts" in recompute else shared) + routed
    return kept / tensor_parallel_size


def _kept_by_scan(model: Model) -> float:
    """Numbers a token: the convolution's output, a state for each chunk, and two in fp32 for each head."""
    inner, conv = mamba_widths(model)
    of_steps = 2 * model.mamba_num_heads * (1 if model.precision == "fp32" else 2)
    return conv + inner * model.mamba_state_dim / CHUNK + of_steps
