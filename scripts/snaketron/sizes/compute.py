"""The seconds that a GPU computes for a token: FLOPs and bytes over what it reached of its peaks.

The shares are those of Hopper GPUs (docs/measurements.md).
"""

from __future__ import annotations

from collections.abc import Sequence

from snaketron.config import Adapters, Model
from snaketron.config.linears import linears, targeted
from snaketron.sizes.activations import layer_activations
from snaketron.sizes.flops import layer_flops
from snaketron.sizes.gpus import Gpu
from snaketron.sizes.parameters import expert_parameters, mamba_widths

# Shares of the peaks, from the profiles of the slices of Nano and Super on an H200 (docs/measurements.md).
PRODUCTS = 0.70  # of the bf16 peak, dense products of layers
OUTPUT = 0.81  # those of the output layer
EXPERTS = 0.64  # products of routed experts, beside the reading of their weights
ATTENTION = 0.41
SCAN = 0.075  # Mamba's scan and convolution, its FLOPs counted as in `sizes.flops`
PASSES = 5.0  # how often the bytes that a layer keeps are read or written: copies, norms, activations
LOSS_PASSES = 2.5  # of the logits
MEMORY = 0.8  # of the memory's peak
# How much faster products are than in bf16: dense ones, and those of experts, whose gradients of weights stay
# in bf16. nvfp4 follows Megatron Bridge's number for GB300, because nothing was measured here.
FASTER = {"fp32": (0.5, 0.5), "bf16": (1.0, 1.0), "nvfp4": (1.5, 1.5)}
FP8 = (1.85, 1.36)
CASTS = 1.7  # as many more passes under fp8 and nvfp4, which round tokens and weights
# How often an adapter reads or writes each input (for A x, for the gradient of A, and to add to its own), and
# each output (to write B A x and add it to W x, and its gradient for those of B and of A x).
ADAPTED_INPUTS, ADAPTED_OUTPUTS = 4, 6
LAYER_ON_HOST = 6.8e-3  # seconds in which the host starts the kernels of a layer, forwards and backwards
# How well the GPU computes while the host starts kernels: what takes as long on both takes 2 ** (1 / 8) times
# that, and 2 ** (1 / 3) where the GPUs of a group wait for each other in each layer.
OVERLAP, OVERLAP_TOGETHER = 8, 3


def stays_in_bf16(model: Model, number: int) -> bool:
    """Whether a layer of the decoder, by its number, stays in bf16 under fp8 and nvfp4."""
    return number >= len(model.hybrid_layer_pattern) - model.bf16_layers_at_end


def overlapped(on_gpu: float, on_host: float, power: int = OVERLAP) -> float:
    """The time of what takes so long on a GPU and on the host that starts its kernels."""
    return (on_gpu**power + on_host**power) ** (1 / power)


def layer_seconds(
    model: Model,
    layer: str,
    seq_length: int,
    gpu: Gpu,
    *,
    in_bf16: bool,
    recompute: Sequence[str] = (),
    frozen: bool = False,
) -> float:
    """Seconds of a layer for a token, forwards and backwards, on a process without tensor parallelism."""
    peak = gpu.flops
    dense, of_experts = _faster(model, in_bf16)
    whole = layer_flops(model, layer, seq_length)
    core, share = 0.0, 1.0  # what is no dense product, and its share of the peak
    if layer == "M":
        inner, _ = mamba_widths(model)
        core, share = 7.0 * inner * model.mamba_state_dim, SCAN
    elif layer == "*":
        core, share = 4 * model.num_attention_heads * model.kv_channels * seq_length / 2, ATTENTION
    elif layer == "E":
        core = 2.0 * model.moe_router_topk * expert_parameters(model)
        share = EXPERTS * of_experts
    products = (whole - core) / (peak * PRODUCTS * dense) + core / (peak * share)
    backward = 1.0 if frozen else 2.0
    forward = 2.0 if "layer" in recompute or (layer == "E" and "moe" in recompute) else 1.0
    if "core_attn" in recompute and layer == "*":
        forward += core / (peak * share) / products
    kept = 2 * layer_activations(model, layer, 1, [], keeps_scan=False)
    passes = (forward + 2) / 3 * PASSES * (CASTS if dense > 1 else 1.0)
    return products * (forward + backward) + passes * kept / (gpu.memory_speed * MEMORY)


def expert_weights_seconds(
    model: Model,
    held: float,
    gradient_bytes: int,
    gpu: Gpu,
    *,
    in_bf16: bool,
    recompute: Sequence[str] = (),
    frozen: bool = False,
) -> float:
    """Seconds in which a process reads the weights of a layer's experts, and adds to their gradients.

    A micro-batch needs them once, however few tokens an expert has of it: with 352 rows an expert (Super,
    TP 4 with EP 4) that takes six tenths of the time of their products.

    Args:
        held: experts of the process; with expert tensor parallelism a share of each.
        gradient_bytes: of a weight's gradient, which is read and written.
    """
    forward = 2 if {"layer", "moe"} & set(recompute) else 1
    passes = forward + 1  # backwards for the gradients of tokens
    width = 4 if model.precision == "fp32" else 2 if in_bf16 or model.precision == "bf16" else 1
    of_weight = passes * width + (0 if frozen else 2 * gradient_bytes)
    return held * expert_parameters(model) * of_weight / (gpu.memory_speed * MEMORY)


def adapters_seconds(model: Model, layer: str, adapters: Adapters, gpu: Gpu) -> float:
    """Seconds in which the adapters of a layer move what goes into and out of its linear layers, for a token.

    Their products have a rank too small to count beside that.
    """
    moved = 0.0
    for linear in targeted(adapters.target_modules, linears(model, layer, with_mtp=False)):
        tokens = model.moe_router_topk if linear.experts else 1
        moved += 2 * tokens * (ADAPTED_INPUTS * linear.inputs + ADAPTED_OUTPUTS * linear.outputs)
    return moved / (gpu.memory_speed * MEMORY)


def _faster(model: Model, in_bf16: bool) -> tuple[float, float]:
    """How much faster products are than in bf16: dense ones, and those of routed experts."""
    return FASTER["bf16"] if in_bf16 and model.precision != "fp32" else FASTER.get(model.precision, FP8)


def output_seconds(model: Model, rows: int, gpu: Gpu, *, frozen: bool = False) -> float:
    """Seconds of the output layer and the loss for a token, and again for each depth of prediction.

    Not of the layers of multi-token prediction, but of what joins them to the decoder.

    Args:
        rows: tokens of the vocabulary, with its padding.
    """
    hidden, backward = model.hidden_size, 1.0 if frozen else 2.0
    products = gpu.flops * OUTPUT
    head = 2 * hidden * rows * (1 + backward) / products + LOSS_PASSES * 2 * rows / (
        gpu.memory_speed * MEMORY
    )
    joined = 4 * hidden * hidden * (1 + backward) / products
    return head * (1 + model.mtp_num_layers) + joined * model.mtp_num_layers
