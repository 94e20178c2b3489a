"""The time of a training step, worked out for a layout: its terms, in seconds.

Each term is an amount (FLOPs, bytes, parameters) over a peak of the GPU times the share of it that was
reached (`sizes.compute`). `sizes.published` compares the sums with all that was measured, here and by others.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass

from snaketron.sizes.compute import (
    LAYER_ON_HOST,
    MEMORY,
    OVERLAP,
    OVERLAP_TOGETHER,
    adapters_seconds,
    expert_weights_seconds,
    layer_seconds,
    output_seconds,
    overlapped,
    stays_in_bf16,
)
from snaketron.sizes.gpus import Gpu
from snaketron.sizes.memory import static_memory, updated_parameters
from snaketron.sizes.parameters import padded_vocab_size
from snaketron.sizes.stages import pipeline_stages, trained_parameters
from snaketron.sizes.traffic import context, exchange, output_sums, sums_of_stages, tensor
from snaketron.sizes.work import Work

RECORDED_ON_HOST = 1.5e-3  # of a layer that is recorded as a CUDA graph
CASTS_ON_HOST = 1.2  # as much more under fp8 and nvfp4
PARTS_ON_HOST = 1.45  # as much more under tensor or context parallelism, with their exchanges
HOST_ADAM = 0.9e-9  # seconds a parameter of an offloaded optimizer


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
    stages = _stages(work, gpu)
    slowest = max(stages, key=lambda stage: stage.total)
    # 1F1B: the slowest stage computes all micro-batches, and waits once for each of the others.
    bubble = sum(stage.total for stage in stages) - slowest.total
    terms = {name: seconds * work.micro_batches for name, seconds in asdict(slowest).items()}
    sums, optimizer = _update(work, gpu, slowest.total)
    return Step(**terms, bubble=bubble, sums=sums, optimizer=optimizer)


def tokens_per_second(work: Work, step: Step) -> float:
    """Tokens a second of each GPU, in such steps."""
    return work.global_batch_size * work.seq_length / step.total / work.run.parallel.world_size


# ------------------------------------------------------------------------------------------ micro-batches


def _stages(work: Work, gpu: Gpu) -> list[_Stage]:
    model, patterns = work.model, pipeline_stages(work.model, work.vocab_size, work.run.parallel)
    stages, first = [], 0
    for layers in patterns:
        stage = _Stage()
        alike = Counter((layer, stays_in_bf16(model, first + i)) for i, layer in enumerate(layers))
        for (layer, in_bf16), count in alike.items():
            _add_layers(stage, work, gpu, layer, in_bf16, count)
        first += len(layers)
        stages.append(stage)
    _add_output(stages[-1], work, gpu)
    for stage, layers in zip(stages, patterns, strict=True):
        _wait_for_host(stage, layers, work)
    return stages


def _add_layers(stage: _Stage, work: Work, gpu: Gpu, layer: str, in_bf16: bool, count: int) -> None:
    """Add `count` layers of a kind."""
    run, tp = work.run, work.run.parallel.tensor_model_parallel_size
    of_token = layer_seconds(
        *(work.model, layer, work.seq_length, gpu),
        in_bf16=in_bf16,
        recompute=run.recompute,
        frozen=work.frozen,
    )
    if work.adapters:
        of_token += adapters_seconds(work.model, layer, work.adapters, gpu)
    seconds = count * work.tokens_of_process / tp * of_token
    name = {"M": "mamba", "*": "attention", "E": "experts", "-": "dense"}[layer]
    setattr(stage, name, getattr(stage, name) + seconds)
    if layer == "E":
        sizes = run.parallel
        of_each = sizes.expert_model_parallel_size * sizes.expert_tensor_parallel_size
        stage.experts += count * expert_weights_seconds(
            work.model,
            work.model.num_moe_experts / of_each,
            2 if work.optimizer.gradient_precision == "bf16" else 4,
            gpu,
            in_bf16=in_bf16,
            recompute=run.recompute,
            frozen=work.frozen,
        )
    stage.exchange += count * exchange(work, gpu, layer).seconds(gpu)
    stage.tensor += count * tensor(work, gpu, layer).seconds(gpu)
    stage.context += count * context(work, gpu, layer).seconds(gpu)


def _add_output(stage: _Stage, work: Work, gpu: Gpu) -> None:
    """Add the output layer and the loss, and as often again as there are depths of multi-token prediction."""
    model, tp = work.model, work.run.parallel.tensor_model_parallel_size
    rows = padded_vocab_size(model, work.vocab_size, tp)
    of_token = output_seconds(model, rows, gpu, frozen=work.frozen)
    stage.output += work.tokens_of_process / tp * of_token
    for layer in model.mtp_hybrid_layer_pattern:  # which stays in bf16
        _add_layers(stage, work, gpu, layer, True, model.mtp_num_layers)
    stage.tensor += output_sums(work, gpu).seconds(gpu)


def _wait_for_host(stage: _Stage, pattern: str, work: Work) -> None:
    """Add what the GPU waits for the host: both overlap, the less the nearer they are.

    They overlap less where GPUs wait for each other in each layer, as for tokens that are exchanged: the
    slowest host counts, and hosts wait for numbers of tokens. The host starts a recorded micro-batch as a
    whole.
    """
    if work.recorded:
        return
    model, parallel = work.model, work.run.parallel
    recorded = pattern.count("M") + pattern.count("*") if work.cuda_graphs else 0
    layers = len(pattern) - recorded
    if stage.output:
        layers += model.mtp_num_layers * len(model.mtp_hybrid_layer_pattern)
    busy = layers * LAYER_ON_HOST + recorded * RECORDED_ON_HOST
    if model.precision not in ("fp32", "bf16"):
        busy *= CASTS_ON_HOST
    if parallel.tensor_model_parallel_size > 1 or parallel.context_parallel_size > 1:
        busy *= PARTS_ON_HOST
    sizes = (
        parallel.tensor_model_parallel_size,
        parallel.context_parallel_size,
        parallel.expert_model_parallel_size,
        parallel.expert_tensor_parallel_size,
    )
    power = OVERLAP_TOGETHER if max(sizes) > 1 else OVERLAP
    there = stage.total
    stage.host = overlapped(there, busy, power) - there


# ------------------------------------------------------------------------------------------- the update


def _update(work: Work, gpu: Gpu, micro_batch: float) -> tuple[float, float]:
    """Seconds of the sums over data parallelism that nothing hides, and of the optimizer.

    On several nodes the sums run during the backward pass of the last micro-batch, two thirds of it.
    """
    parallel, off = work.run.parallel, work.run.offload_optimizer
    sums = optimizer = 0.0
    fused = work.optimizer.gradient_precision == work.optimizer.moment_precision == "bf16"
    trained = trained_parameters(work.model, work.vocab_size, parallel, work.adapters)
    memories = static_memory(work)
    for stage, memory, moved in zip(trained, memories, sums_of_stages(work, gpu), strict=True):
        sums = max(sums, moved.seconds(gpu))
        # One pass over all in bf16; else also division by the tokens, norm and clipping, each on its own.
        of_gradients = 2 if fused else 6
        touched = of_gradients * memory.gradients + 2 * (
            memory.main_weights + memory.moments + memory.weights
        )
        on_host = off * updated_parameters(stage, parallel) * HOST_ADAM
        optimizer = max(optimizer, touched / (gpu.memory_speed * MEMORY) + on_host)
    if parallel.world_size > gpu.domain:
        sums = max(0.0, sums - 2 / 3 * micro_batch)
    return sums, optimizer
