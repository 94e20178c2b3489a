"""What a process of a training keeps in its memory, in bytes: of a GPU, or without one of its node."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from snaketron.config import Model, Parallel
from snaketron.sizes.activations import layer_activations
from snaketron.sizes.cpu_activations import cpu_activation_memory
from snaketron.sizes.parameters import Parameters, expert_width, padded_vocab_size, weight_bytes
from snaketron.sizes.stages import pipeline_stages, stage_parameters, trained_parameters
from snaketron.sizes.work import Work


@dataclass(frozen=True)
class Memory:
    """Bytes of a process by what they are."""

    weights: float
    gradients: float
    main_weights: float  # fp32 copies that the optimizer updates
    moments: float
    activations: float = 0.0
    recordings: float = 0.0  # of layers, as CUDA graphs

    @property
    def static(self) -> float:
        """What lies there between two steps, too."""
        return self.weights + self.gradients + self.main_weights + self.moments

    @property
    def total(self) -> float:
        return self.static + self.activations + self.recordings


def fullest(work: Work, *, on_gpus: bool = True) -> Memory:
    """What the fullest process holds at its peak, in tensors and recordings of layers.

    Not counted on a GPU: what the allocator reserves beside tensors, buffers of libraries (1 to 2 GB).
    """
    static = static_memory(work)
    activations = activation_memory(work) if on_gpus else cpu_activation_memory(work)
    recordings = recorded_memory(work) if on_gpus and work.cuda_graphs else [0.0] * len(static)
    stages = [
        replace(kept, activations=peak, recordings=recorded)
        for kept, peak, recorded in zip(static, activations, recordings, strict=True)
    ]
    return max(stages, key=lambda stage: stage.total)


def peak_bytes(work: Work) -> float:
    """Bytes in tensors and recordings on the GPU of the fullest process, at their peak."""
    return fullest(work).total


def static_memory(work: Work) -> list[Memory]:
    """What one process of each pipeline stage keeps from step to step, without what is offloaded.

    Weights are bf16 unless the model is in fp32. The distributed optimizer divides main weights and Adam's
    two moments among the processes that hold the same parameters. Main weights are fp32, and with moments in
    bf16 only the 16 bits that bf16 weights lack; a model in fp32 has none, or with moments in bf16 a copy
    that Transformer Engine makes and does not use. With adapters, the model has weights alone, and only the
    adapters have gradients and an optimizer.
    """
    model, parallel, optimizer = work.model, work.run.parallel, work.optimizer
    in_bf16, short = model.precision != "fp32", optimizer.moment_precision == "bf16"
    main = (2 if short else 4) if in_bf16 else (4 if short else 0)
    found = []
    stages = stage_parameters(model, work.vocab_size, parallel)
    trained = trained_parameters(model, work.vocab_size, parallel, work.adapters)
    for stage, tuned in zip(stages, trained, strict=True):
        held = stage.of_process(parallel) + (tuned.of_process(parallel) if work.adapters else 0)
        dense, expert = tuned.dense_of_process(parallel), tuned.expert_of_process(parallel)
        here = updated_parameters(tuned, parallel) * (1 - work.run.offload_optimizer)
        # Under fp8 the routed experts lie there rounded too, plainly and transposed.
        rounded = 2 * expert if model.precision.startswith("fp8") and not work.adapters else 0
        found.append(
            Memory(
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


def activation_memory(work: Work) -> list[float]:
    """Bytes of activations on the GPU of each pipeline stage at their peak, the end of a forward pass.

    A stage also keeps the micro-batches that later stages are still computing. The logits of the output layer
    and of each depth of multi-token prediction are kept until their gradient takes their place.
    """
    model, parallel, tp = work.model, work.run.parallel, work.run.parallel.tensor_model_parallel_size

    def layers(pattern: str) -> float:
        return sum(
            count * layer_activations(model, layer, tp, work.run.recompute, work.keeps_scan)
            for layer, count in Counter(pattern).items()
        )

    stages = pipeline_stages(model, work.vocab_size, parallel)
    found = [layers(stage) for stage in stages]
    logits = padded_vocab_size(model, work.vocab_size, tp)
    # Both norms before the joining projection, its input, and the block's layers.
    depth = 6 * model.hidden_size / tp + layers(model.mtp_hybrid_layer_pattern)
    found[-1] += logits / tp + model.mtp_num_layers * (depth + logits / tp)
    each = weight_bytes(model) * work.tokens_of_process
    return [each * kept * (len(stages) - stage) for stage, kept in enumerate(found)]


# What recordings of layers take in fp8, of what they take in bf16: rounded inputs stay in both directions.
# With it, Nano's layers are estimated 4 % below what was reserved in either (docs/measurements.md).
RECORDED_IN_FP8 = 1.6


def recorded_memory(work: Work) -> list[float]:
    """Bytes that recordings (CUDA graphs) of attention and Mamba layers take on the GPU of each stage.

    They keep what the layers keep in memory of their own, and the allocator does not give back what the first
    step had for it. So it is there twice, for each micro-batch that a stage keeps. With this, the estimate is
    what was reserved on GPUs within 4 % (docs/measurements.md).
    """
    model, run = work.model, work.run
    tp = run.parallel.tensor_model_parallel_size
    stages = pipeline_stages(model, work.vocab_size, run.parallel)
    stages[-1] += model.mtp_hybrid_layer_pattern * model.mtp_num_layers
    kept = [
        sum(
            layers.count(one) * layer_activations(model, one, tp, run.recompute, work.keeps_scan)
            for one in "M*"
        )
        for layers in stages
    ]
    each = weight_bytes(model) * (RECORDED_IN_FP8 if model.precision.startswith("fp8") else 1)
    return [
        each * work.tokens_of_process * numbers * (len(stages) - stage) for stage, numbers in enumerate(kept)
    ]


def conversion_memory(model: Model, vocab_size: int) -> float:
    """Bytes of host memory that an export or an import needs: its programs, and twice the largest tensor.

    That is the one of all routed experts of a layer, or the embedding.
    """
    experts = model.num_moe_experts * model.moe_ffn_hidden_size * expert_width(model)
    largest = max(experts, padded_vocab_size(model, vocab_size, 1) * model.hidden_size)
    return 1.5e9 + 2 * largest * weight_bytes(model)
