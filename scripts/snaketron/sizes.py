"""How large a model is: parameters, what divides them among processes, FLOPs and bytes.

Plain arithmetic on the configuration, without torch: the graph is built from it. Parameters are those
that megatron-core builds, in the layout that it gives them (tests compare with models it built).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from snaketron.config import Adapters, Lora, Model, Optimizer, Parallel, Run
from snaketron.config.targets import Linear, linears, targeted

CONV_WIDTH = 4  # of Mamba-2's convolution, megatron-core's d_conv


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, by what divides them among the processes of a pipeline stage."""

    tensor: int = 0  # by tensor parallelism
    replicated: int = 0  # by nothing
    expert: int = 0  # routed experts, by expert and expert tensor parallelism

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def total(self) -> int:
        return self.tensor + self.replicated + self.expert

    def dense_of_process(self, parallel: Parallel) -> int:
        """What one process holds beside routed experts."""
        return self.tensor // parallel.tensor_model_parallel_size + self.replicated

    def expert_of_process(self, parallel: Parallel) -> int:
        """What one process holds of the routed experts."""
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


# -------------------------------------------------------------------------------------- parameters


def layer_parameters(model: Model, layer: str) -> Parameters:
    """Parameters of a layer, by its letter in the pattern, with the norm before it."""
    hidden = model.hidden_size
    if layer == "M":
        inner, conv = _mamba_widths(model)
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
    experts, latent = model.num_moe_experts, _expert_width(model)
    projections = 2 * hidden * latent if model.moe_latent_size else 0
    return Parameters(
        tensor=2 * hidden * model.moe_shared_expert_intermediate_size,
        replicated=hidden * experts + projections + hidden,
        expert=experts * _expert_parameters(model),
    )


def mtp_parameters(model: Model) -> Parameters:
    """Parameters of multi-token prediction: one block, whatever the number of depths."""
    if not model.mtp_num_layers:
        return Parameters()
    hidden = model.hidden_size
    joined = Parameters(2 * hidden * hidden, 3 * hidden)  # eh_proj; enorm, hnorm and the final norm
    return joined + _sum(layer_parameters(model, layer) for layer in model.mtp_hybrid_layer_pattern)


def stage_parameters(model: Model, vocab_size: int, parallel: Parallel) -> list[Parameters]:
    """Parameters of each pipeline stage.

    The first one holds the embedding. The last one holds the final norm, the output layer and
    multi-token prediction, which needs the embedding too: with several stages it holds a copy.
    """
    stages = pipeline_pattern(model.hybrid_layer_pattern, parallel.pipeline_model_parallel_size).split("|")
    found = [_sum(layer_parameters(model, layer) for layer in stage) for stage in stages]
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
    """Parameters that a token meets in the decoder: of the routed experts only `moe_router_topk`; no
    multi-token prediction, which only training has."""
    layers = _sum(layer_parameters(model, layer) for layer in model.hybrid_layer_pattern)
    idle = model.num_moe_experts - model.moe_router_topk
    unused = model.hybrid_layer_pattern.count("E") * idle * _expert_parameters(model)
    tables = 2 * padded_vocab_size(model, vocab_size, 1) * model.hidden_size
    return layers.total - unused + tables + model.hidden_size


def adapter_parameters(model: Model, parallel: Parallel, adapters: Adapters) -> list[Parameters]:
    """Parameters of the adapters of each pipeline stage: A (rank, inputs) and B (outputs, rank) of a layer.

    Tensor parallelism divides the one of them that has the axis that it divides in the layer.
    """
    stages = pipeline_pattern(model.hybrid_layer_pattern, parallel.pipeline_model_parallel_size).split("|")
    return [
        _sum(
            _adapter(linear, adapters, parallel)
            for linear in targeted(
                adapters.target_modules, linears(model, stage, with_mtp=i == len(stages) - 1)
            )
        )
        for i, stage in enumerate(stages)
    ]


def _adapter(linear: Linear, adapters: Adapters, parallel: Parallel) -> Parameters:
    if linear.experts:
        rank = adapters.expert_rank or adapters.rank
        whole = linear.inputs if linear.parallel == "column" else linear.outputs
        divided = linear.inputs + linear.outputs - whole
        # Each process of expert tensor parallelism has the whole one.
        return Parameters(
            expert=linear.experts * rank * (divided + whole * parallel.expert_tensor_parallel_size)
        )
    a, b = adapters.rank * linear.inputs, adapters.rank * linear.outputs
    if linear.parallel == "replicated":
        return Parameters(replicated=a + b)
    return Parameters(b, a) if linear.parallel == "column" else Parameters(a, b)


# ------------------------------------------------------------------------------------------- FLOPs


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
        inner, conv = _mamba_widths(model)
        projections = hidden * (inner + conv + model.mamba_num_heads) + inner * hidden
        return 2 * projections + 7 * inner * model.mamba_state_dim
    if layer == "*":
        queries = model.num_attention_heads * model.kv_channels
        keys_values = 2 * model.num_query_groups * model.kv_channels
        return 2 * hidden * (2 * queries + keys_values) + 4 * queries * seq_length / 2
    if layer == "-":
        return 4 * hidden * model.ffn_hidden_size
    projections = 2 * hidden * _expert_width(model) if model.moe_latent_size else 0
    router, shared = hidden * model.num_moe_experts, 2 * hidden * model.moe_shared_expert_intermediate_size
    return 2 * (router + projections + shared + model.moe_router_topk * _expert_parameters(model))


def training_flops(model: Model, vocab_size: int, seq_length: float) -> float:
    """Model FLOPs of training on one token: three times the forward pass, the backward pass having a
    product for the gradient of the weights and one for that of the input.

    The output layer counts once, and once more for each depth of multi-token prediction.
    """
    hidden = model.hidden_size
    output = 2 * hidden * padded_vocab_size(model, vocab_size, 1)
    forward = output + sum(layer_flops(model, layer, seq_length) for layer in model.hybrid_layer_pattern)
    depth: float = 2 * 2 * hidden * hidden + output
    depth += sum(layer_flops(model, layer, seq_length) for layer in model.mtp_hybrid_layer_pattern)
    return 3 * (forward + model.mtp_num_layers * depth)


# ------------------------------------------------------------------------------------------ memory


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
    """What a process of each pipeline stage keeps on its GPU.

    Weights are bf16 unless the model is in fp32. The distributed optimizer divides main weights and Adam's
    two moments among the processes that hold the same parameters. Main weights are fp32, and with moments in
    bf16 the 16 bits that bf16 weights lack; a model in fp32 has none. With adapters they alone have gradients
    and optimizer, and the model its weights.
    """
    optimizer = optimizer or Optimizer()
    in_bf16, short = model.precision != "fp32", optimizer.moment_precision == "bf16"
    processes = parallel.world_size // parallel.pipeline_model_parallel_size
    copies = parallel.data_parallel_size * parallel.context_parallel_size
    expert_copies = processes // (parallel.expert_model_parallel_size * parallel.expert_tensor_parallel_size)
    found = []
    stages = stage_parameters(model, vocab_size, parallel)
    trained = adapter_parameters(model, parallel, adapters) if adapters else stages
    for stage, tuned in zip(stages, trained, strict=True):
        held = stage.of_process(parallel) + (tuned.of_process(parallel) if adapters else 0)
        dense, expert = tuned.dense_of_process(parallel), tuned.expert_of_process(parallel)
        here = (dense / copies + expert / expert_copies) * (1 - offload_optimizer)
        found.append(
            StaticMemory(
                weights=(2 if in_bf16 else 4) * held,
                gradients=(2 if optimizer.gradient_precision == "bf16" else 4) * (dense + expert),
                main_weights=(2 if short else 4) * here if in_bf16 else 0,
                moments=(4 if short else 8) * here,
            )
        )
    return found


def static_of_run(model: Model, vocab_size: int, run: Run, optimizer: Optimizer) -> list[StaticMemory]:
    """The same for a stage as it is configured; of adapters if it is LoRA."""
    adapters = run if isinstance(run, Lora) else None
    return static_memory(model, vocab_size, run.parallel, optimizer, run.offload_optimizer, adapters)


def layer_activations(model: Model, layer: str, tensor_parallel_size: int, recompute: Sequence[str]) -> float:
    """Numbers for each token that a layer keeps on a GPU for its backward pass.

    The input of the norm and its output, which sequence parallelism divides as tensor parallelism does the
    rest; outputs of projections; what attention, scan and gated norm keep of their own output. Experts keep
    their input and what is before the activation.
    """
    hidden = model.hidden_size
    if "layer" in recompute:
        return hidden / tensor_parallel_size
    norm = hidden * (1 if "layernorm" in recompute else 2)
    if layer == "M":
        inner, conv = _mamba_widths(model)
        kept = norm + (inner + conv + model.mamba_num_heads) + 3 * inner
    elif layer == "*":
        queries = model.num_attention_heads * model.kv_channels
        keys_values = 2 * model.num_query_groups * model.kv_channels
        kept = norm + 2 * queries + keys_values
    elif layer == "-":
        kept = norm if "mlp" in recompute else norm + 2 * model.ffn_hidden_size
    else:
        shared = 2 * model.moe_shared_expert_intermediate_size
        width = _expert_width(model)
        routed = 2 * width + model.moe_router_topk * (width + model.moe_ffn_hidden_size)
        if "moe" in recompute:
            shared = routed = 0
        kept = norm + (0 if "shared_experts" in recompute else shared) + routed
    return kept / tensor_parallel_size


def activation_memory(model: Model, vocab_size: int, seq_length: int, run: Run) -> list[float]:
    """Bytes of activations of a process of each pipeline stage at their peak, the end of a forward pass.

    A stage keeps the micro-batches that are under way in the ones after it as well. The logits of the output
    layer, and of each depth of multi-token prediction, are kept for their gradient, which takes their place.
    """
    parallel, tp = run.parallel, run.parallel.tensor_model_parallel_size
    tokens = run.micro_batch_size * seq_length / parallel.context_parallel_size

    def layers(pattern: str) -> float:
        return sum(layer_activations(model, layer, tp, run.recompute) for layer in pattern)

    stages = pipeline_pattern(model.hybrid_layer_pattern, parallel.pipeline_model_parallel_size).split("|")
    found = [layers(stage) for stage in stages]
    logits = padded_vocab_size(model, vocab_size, tp)
    # Both norms before the joining projection, its input, and the block's layers.
    depth = 6 * model.hidden_size / tp + layers(model.mtp_hybrid_layer_pattern)
    found[-1] += logits / tp + model.mtp_num_layers * (depth + logits / tp)
    width = 4 if model.precision == "fp32" else 2
    return [width * tokens * kept * (len(stages) - stage) for stage, kept in enumerate(found)]


def memory_of_process(
    model: Model, vocab_size: int, seq_length: int, run: Run, optimizer: Optimizer
) -> float:
    """Bytes in tensors on the GPU of the fullest process, at their peak.

    Not counted: what the allocator reserves beside them, buffers of libraries (1 to 2 GB), CUDA graphs.
    """
    static = static_of_run(model, vocab_size, run, optimizer)
    activations = activation_memory(model, vocab_size, seq_length, run)
    return max(kept.total + peak for kept, peak in zip(static, activations, strict=True))


# ----------------------------------------------------------------------------------------- widths


def _mamba_widths(model: Model) -> tuple[int, int]:
    """Channels of x (and of z), and of x, B and C together."""
    inner = model.mamba_num_heads * model.mamba_head_dim
    return inner, inner + 2 * model.mamba_num_groups * model.mamba_state_dim


def _expert_width(model: Model) -> int:
    return model.moe_latent_size or model.hidden_size


def _expert_parameters(model: Model) -> int:
    return 2 * _expert_width(model) * model.moe_ffn_hidden_size


def _sum(parameters: Iterable[Parameters]) -> Parameters:
    return sum(parameters, Parameters())
