"""The time of a training step, worked out for a layout: its terms, in seconds.

Each term is an amount (FLOPs, bytes, parameters) over a peak of the GPU times the share of it that was
reached. The shares are those of one and two Hopper GPUs (docs/measurements.md). `sizes.published` compares
the sums with all that was measured, here and by others.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass

from snaketron.config import Model
from snaketron.sizes.flops import layer_flops
from snaketron.sizes.gpus import Gpu
from snaketron.sizes.memory import layer_activations, memory_of_process
from snaketron.sizes.parameters import (
    expert_parameters,
    mamba_widths,
    padded_vocab_size,
    pipeline_pattern,
)
from snaketron.sizes.traffic import (
    Work,
    context,
    exchange,
    output_sums,
    sums_of_stages,
    tensor,
    tokens_of_process,
)

# Shares of the peaks, from the profiles of the slices of Nano and Super on an H200 (docs/measurements.md).
PRODUCTS = 0.70  # of the bf16 peak, dense products of layers
OUTPUT = 0.81  # those of the output layer
EXPERTS = 0.63  # products of routed experts
ATTENTION = 0.41
SCAN = 0.075  # Mamba's scan and convolution, its FLOPs counted as in `sizes.flops`
PASSES = 5.0  # how often the bytes that a layer keeps are read or written: copies, norms, activations
LOSS_PASSES = 2.5  # of the logits
MEMORY = 0.8  # of the memory's peak
LAYER_ON_HOST = 6.8e-3  # seconds in which the host starts the kernels of a layer, forwards and backwards
RECORDED_ON_HOST = 1.5e-3  # of a layer that is recorded as a CUDA graph
CASTS_ON_HOST = 1.2  # as much more under fp8 and nvfp4
PARTS_ON_HOST = 1.4  # as much more under tensor or context parallelism, with their exchanges
HOST_ADAM = 0.9e-9  # seconds a parameter of an offloaded optimizer
# How much faster products are than in bf16: dense ones, and those of experts, whose gradients of weights stay
# in bf16. nvfp4 follows Megatron Bridge's number for GB300, because nothing was measured here.
FASTER = {"fp32": (0.5, 0.5), "bf16": (1.0, 1.0), "nvfp4": (1.5, 1.5)}
FP8 = (1.85, 1.28)
CASTS = 1.7  # as many more passes under fp8 and nvfp4, which round tokens and weights


@dataclass(frozen=True)
class Step:
    """Seconds of a step by what they go to; each is what the terms before it do not hide."""

    mamba: float
    attention: float
    experts: float
    dense: float
    output: float  # output layer, loss, and what joins multi-token prediction
    host: float  # waiting for the host, which starts kernels
    exchange: float  # of tokens between experts
    tensor: float  # tensor parallelism
    context: float  # context parallelism
    bubble: float  # of the pipeline: waiting for other stages, and stages that compute less
    sums: float  # of gradients, and gathering weights, over data parallelism
    optimizer: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


@dataclass
class _Stage:
    """Seconds of a micro-batch on a process of a pipeline stage, forwards and backwards."""

    mamba: float = 0.0
    attention: float = 0.0
    experts: float = 0.0
    dense: float = 0.0
    output: float = 0.0
    host: float = 0.0
    exchange: float = 0.0
    tensor: float = 0.0
    context: float = 0.0

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def step_time(work: Work, gpu: Gpu) -> Step:
    """The estimate. Experts are taken to be loaded evenly; an uneven load stretches `experts`."""
    parallel = work.run.parallel
    stages = _stages(work, gpu)
    micro_batches = work.global_batch_size / (work.run.micro_batch_size * parallel.data_parallel_size)
    slowest = max(stages, key=lambda stage: stage.total)
    # 1F1B: the slowest stage computes all micro-batches, and waits once for each of the others.
    bubble = sum(stage.total for stage in stages) - slowest.total
    terms = {name: seconds * micro_batches for name, seconds in asdict(slowest).items()}
    sums, optimizer = _update(work, gpu, slowest.total)
    return Step(**terms, bubble=bubble, sums=sums, optimizer=optimizer)


def tokens_per_second(work: Work, gpu: Gpu) -> float:
    """Tokens a second of each GPU."""
    tokens = work.global_batch_size * work.seq_length
    return tokens / step_time(work, gpu).total / work.run.parallel.world_size


def peak_bytes(work: Work) -> float:
    """Bytes in tensors on the fullest GPU."""
    return memory_of_process(
        work.model, work.vocab_size, work.seq_length, work.run, work.optimizer, work.keeps_scan
    )


# ------------------------------------------------------------------------------------------ micro-batches


def _stages(work: Work, gpu: Gpu) -> list[_Stage]:
    model, parallel = work.model, work.run.parallel
    pattern = pipeline_pattern(model.hybrid_layer_pattern, parallel.pipeline_model_parallel_size)
    stages, first = [], 0
    for layers in pattern.split("|"):
        stage = _Stage()
        alike = Counter((layer, _in_bf16(model, first + i)) for i, layer in enumerate(layers))
        for (layer, in_bf16), count in alike.items():
            _add_layers(stage, work, gpu, layer, in_bf16, count)
        first += len(layers)
        stages.append(stage)
    _add_output(stages[-1], work, gpu)
    for stage in stages:
        _wait_for_host(stage, work)
    return stages


def _in_bf16(model: Model, number: int) -> bool:
    """Whether a layer of the decoder stays in bf16 under fp8 and nvfp4."""
    return number >= len(model.hybrid_layer_pattern) - model.bf16_layers_at_end


def _add_layers(stage: _Stage, work: Work, gpu: Gpu, layer: str, in_bf16: bool, count: int) -> None:
    """Add `count` layers of a kind."""
    tp = work.run.parallel.tensor_model_parallel_size
    seconds = count * tokens_of_process(work) / tp * _compute(work, gpu, layer, in_bf16)
    name = {"M": "mamba", "*": "attention", "E": "experts", "-": "dense"}[layer]
    setattr(stage, name, getattr(stage, name) + seconds)
    stage.exchange += count * exchange(work, gpu, layer).seconds(gpu)
    stage.tensor += count * tensor(work, gpu, layer).seconds(gpu)
    stage.context += count * context(work, gpu, layer).seconds(gpu)


def _compute(work: Work, gpu: Gpu, layer: str, in_bf16: bool) -> float:
    """Seconds of a layer for a token of one process without tensor parallelism."""
    model, recompute = work.model, work.run.recompute
    peak = gpu.flops
    dense, of_experts = _faster(model, in_bf16)
    whole = layer_flops(model, layer, work.seq_length)
    core, share = 0.0, 1.0  # what is no dense product, and its share of the peak
    if layer == "M":
        inner, _ = mamba_widths(model)
        core, share = 7.0 * inner * model.mamba_state_dim, SCAN
    elif layer == "*":
        core, share = 4 * model.num_attention_heads * model.kv_channels * work.seq_length / 2, ATTENTION
    elif layer == "E":
        core = 2.0 * model.moe_router_topk * expert_parameters(model)
        share = EXPERTS * of_experts
    products = (whole - core) / (peak * PRODUCTS * dense) + core / (peak * share)
    backward = 1.0 if work.frozen else 2.0
    forward = 2.0 if "layer" in recompute or (layer == "E" and "moe" in recompute) else 1.0
    if "core_attn" in recompute and layer == "*":
        forward += core / (peak * share) / products
    kept = 2 * layer_activations(model, layer, 1, [], keeps_scan=False)
    passes = (forward + 2) / 3 * PASSES * (CASTS if dense > 1 else 1.0)
    return products * (forward + backward) + passes * kept / (gpu.memory_speed * MEMORY)


def _faster(model: Model, in_bf16: bool) -> tuple[float, float]:
    """How much faster products are than in bf16: dense ones, and those of routed experts."""
    return FASTER["bf16"] if in_bf16 and model.precision != "fp32" else FASTER.get(model.precision, FP8)


def _add_output(stage: _Stage, work: Work, gpu: Gpu) -> None:
    """Add the output layer and the loss, and as often again as there are depths of multi-token prediction."""
    model, parallel = work.model, work.run.parallel
    tp, tokens, hidden = parallel.tensor_model_parallel_size, tokens_of_process(work), model.hidden_size
    rows = padded_vocab_size(model, work.vocab_size, tp)
    products = gpu.flops * OUTPUT
    backward = 1.0 if work.frozen else 2.0
    head = 2 * hidden * rows * (1 + backward) / products + LOSS_PASSES * 2 * rows / (
        gpu.memory_speed * MEMORY
    )
    joined = 4 * hidden * hidden * (1 + backward) / products
    depths = model.mtp_num_layers
    stage.output += tokens / tp * (head * (1 + depths) + joined * depths)
    for layer in model.mtp_hybrid_layer_pattern:  # which stays in bf16
        _add_layers(stage, work, gpu, layer, True, depths)
    stage.tensor += output_sums(work, gpu).seconds(gpu)


def _wait_for_host(stage: _Stage, work: Work) -> None:
    """Add what the GPU waits for the host: both overlap, the less the nearer they are.

    The host starts a recorded micro-batch as a whole.
    """
    if work.recorded:
        return
    model, parallel = work.model, work.run.parallel
    pattern = model.hybrid_layer_pattern
    share = 1 / parallel.pipeline_model_parallel_size
    recorded = (pattern.count("M") + pattern.count("*")) * share if work.cuda_graphs else 0.0
    layers = len(pattern) * share - recorded
    if stage.output:
        layers += model.mtp_num_layers * len(model.mtp_hybrid_layer_pattern)
    busy = layers * LAYER_ON_HOST + recorded * RECORDED_ON_HOST
    if model.precision not in ("fp32", "bf16"):
        busy *= CASTS_ON_HOST
    if parallel.tensor_model_parallel_size > 1 or parallel.context_parallel_size > 1:
        busy *= PARTS_ON_HOST
    there = stage.total
    stage.host = (there**8 + busy**8) ** (1 / 8) - there


# ------------------------------------------------------------------------------------------- the update


def _update(work: Work, gpu: Gpu, micro_batch: float) -> tuple[float, float]:
    """Seconds of the sums over data parallelism that nothing hides, and of the optimizer.

    On several nodes the sums run during the backward pass of the last micro-batch, two thirds of it.
    """
    parallel, off = work.run.parallel, work.run.offload_optimizer
    copies = parallel.data_parallel_size * parallel.context_parallel_size
    of_expert = parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size
    processes = parallel.world_size // parallel.pipeline_model_parallel_size
    sums = optimizer = 0.0
    fused = work.optimizer.gradient_precision == work.optimizer.moment_precision == "bf16"
    for (dense, expert), memory, moved in zip(*sums_of_stages(work, gpu), strict=True):
        sums = max(sums, moved.seconds(gpu))
        # One pass over all in bf16; else also division by the tokens, norm and clipping, each on its own.
        of_gradients = 2 if fused else 6
        touched = of_gradients * memory.gradients + 2 * (
            memory.main_weights + memory.moments + memory.weights
        )
        on_host = off * (dense / copies + expert * of_expert / processes) * HOST_ADAM
        optimizer = max(optimizer, touched / (gpu.memory_speed * MEMORY) + on_host)
    if parallel.world_size > gpu.domain:
        sums = max(0.0, sums - 2 / 3 * micro_batch)
    return sums, optimizer
