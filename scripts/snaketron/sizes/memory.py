"""What a training keeps in the memory of a GPU, in bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from snaketron.config import Adapters, Model, Optimizer, Parallel, Run
from snaketron.sizes.activations import layer_activations
from snaketron.sizes.parameters import Parameters, expert_width, padded_vocab_size, weight_bytes
from snaketron.sizes.stages import pipeline_stages, stage_parameters, trained_parameters
from snaketron.sizes.work import Work


@dataclass(frozen=True)
class StaticMemory:
    """Bytes that one process keeps from step to step."""

    weights: float
    gradients: float
    main_weights: float  # fp32 copies that the optimizer updates
    moments: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.main_weights + self.moments


def static_memory(
    model: Model,
    vocab_size: int,
    parallel: Parallel,
    optimizer: Optimizer | None = None,
    offload_optimizer: float = 0.0,
    adapters: Adapters | None = None,
) -> list[StaticMemory]:
    """What one process of each pipeline stage keeps on its GPU from step to step.

    Weights are bf16 unless the model is in fp32. The distributed optimizer divides main weights and Adam's
    two moments among the processes that hold the same parameters. Main weights are fp32, and with moments in
    bf16 only the 16 bits that bf16 weights lack; a model in fp32 has none, or with moments in bf16 a copy
    that Transformer Engine makes and does not use. With adapters, the model has weights alone, and only the
    adapters have gradients and an optimizer.
    """
    optimizer = optimizer or Optimizer()
    in_bf16, short = model.precision != "fp32", optimizer.moment_precision == "bf16"
    main = (2 if short else 4) if in_bf16 else (4 if short else 0)
    found = []
    stages = stage_parameters(model, vocab_size, parallel)
    trained = trained_parameters(model, vocab_size, parallel, adapters)
    for stage, tuned in zip(stages, trained, strict=True):
        held = stage.of_process(parallel) + (tuned.of_process(parallel) if adapters else 0)
        dense, expert = tuned.dense_of_process(parallel), tuned.expert_of_process(parallel)
        here = updated_parameters(tuned, parallel) * (1 - offload_optimizer)
        # Under fp8 the routed experts lie there rounded too, plainly and transposed.
        rounded = 2 * expert if model.precision.startswith("fp8") and not adapters else 0
        found.append(
            StaticMemory(
                weights=weight_bytes(model) * held + rounded,
                gradients=(2 if optimizer.gradient_precision == "bf16" else 4) * (dense + expert),
                main_weights=main * here,
                moments=(4 if short else 8) * here,
            )
        )
    return found


def updated_parameters(stage: Parameters, parallel: Parallel) -> float:
    """How many of a stage's parameters a process updates, and writes to checkpoints."""
    processes = parallel.world_size // parallel.pipeline_model_parallel_size
    copies = parallel.data_parallel_size * parallel.context_parallel_size
    expert_copies = processes // (parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size)
    return stage.dense_of_process(parallel) / copies + stage.expert_of_process(parallel) / expert_copies


def static_of_run(model: Model, vocab_size: int, run: Run, optimizer: Optimizer) -> list[StaticMemory]:
    """`static_memory` of a training as it is configured; under LoRA only adapters are trained."""
    adapters = run if isinstance(run, Adapters) else None
    return static_memory(model, vocab_size, run.parallel, optimizer, run.offload_optimizer, adapters)


def activation_memory(
    model: Model, vocab_size: int, seq_length: int, run: Run, keeps_scan: bool = True
) -> list[float]:
    """Bytes of activations on the GPU of each pipeline stage at their peak, the end of a forward pass.

    A stage also keeps the micro-batches that later stages are still computing. The logits of the output layer
    and of each depth of multi-token prediction are kept until their gradient takes their place.
    """
    parallel, tp = run.parallel, run.parallel.tensor_model_parallel_size
    tokens = run.micro_batch_size * seq_length / parallel.context_parallel_size

    def layers(pattern: str) -> float:
        return sum(
            count * layer_activations(model, layer, tp, run.recompute, keeps_scan)
            for layer, count in Counter(pattern).items()
        )

    stages = pipeline_stages(model, vocab_size, parallel)
    found = [layers(stage) for stage in stages]
    logits = padded_vocab_size(model, vocab_size, tp)
    # Both norms before the joining projection, its input, and the block's layers.
    depth = 6 * model.hidden_size / tp + layers(model.mtp_hybrid_layer_pattern)
    found[-1] += logits / tp + model.mtp_num_layers * (depth + logits / tp)
    return [weight_bytes(model) * tokens * kept * (len(stages) - stage) for stage, kept in enumerate(found)]


# What recordings of layers take in fp8, of what they take in bf16: rounded inputs stay in both directions.
# With it, Nano's layers are estimated 4 % below what was reserved in either (docs/measurements.md).
RECORDED_IN_FP8 = 1.6


def recorded_memory(
    model: Model, vocab_size: int, seq_length: int, run: Run, keeps_scan: bool = True
) -> list[float]:
    """Bytes that recordings (CUDA graphs) of attention and Mamba layers take on the GPU of each stage.

    They keep what the layers keep in memory of their own, and the allocator does not give back what the first
    step had for it. So it is there twice, for each micro-batch that a stage keeps. With this, the estimate is
    what was reserved on GPUs within 4 % (docs/measurements.md).
    """
    tp = run.parallel.tensor_model_parallel_size
    tokens = run.micro_batch_size * seq_length / run.parallel.context_parallel_size
    stages = pipeline_stages(model, vocab_size, run.parallel)
    stages[-1] += model.mtp_hybrid_layer_pattern * model.mtp_num_layers
    kept = [
        sum(layers.count(one) * layer_activations(model, one, tp, run.recompute, keeps_scan) for one in "M*")
        for layers in stages
    ]
    each = weight_bytes(model) * (RECORDED_IN_FP8 if model.precision.startswith("fp8") else 1)
    return [each * tokens * numbers * (len(stages) - stage) for stage, numbers in enumerate(kept)]


def peak_bytes(work: Work) -> float:
    """Bytes in tensors and recordings of layers on the GPU of the fullest process, at their peak.

    Not counted: what the allocator reserves beside tensors, buffers of libraries (1 to 2 GB).
    """
    about = (work.model, work.vocab_size)
    parts = [
        [kept.total for kept in static_of_run(*about, work.run, work.optimizer)],
        activation_memory(*about, work.seq_length, work.run, work.keeps_scan),
    ]
    if work.cuda_graphs:
        parts.append(recorded_memory(*about, work.seq_length, work.run, work.keeps_scan))
    return max(map(sum, zip(*parts, strict=True)))


def conversion_memory(model: Model, vocab_size: int) -> float:
    """Bytes of host memory that an export or an import needs: its programs, and twice the largest tensor.

    That is the one of all routed experts of a layer, or the embedding.
    """
    experts = model.num_moe_experts * model.moe_ffn_hidden_size * expert_width(model)
    largest = max(experts, padded_vocab_size(model, vocab_size, 1) * model.hidden_size)
    return 1.5e9 + 2 * largest * weight_bytes(model)
