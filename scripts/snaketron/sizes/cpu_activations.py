"""What a training on CPUs keeps for its backward pass: more than one on GPUs, by the layers of a CPU.

`model.megatron` has these in `cpu_layers`, `mamba2_layer` and `cpu_experts`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from snaketron.config import Model
from snaketron.sizes.parameters import expert_width, mamba_widths, padded_vocab_size, weight_bytes
from snaketron.sizes.stages import pipeline_stages
from snaketron.sizes.work import Work

CHUNK = 32  # tokens of a chunk of Mamba's scan, `mamba2.CHUNK_SIZE`
FP32 = 4


def cpu_activation_memory(work: Work) -> list[float]:
    """Bytes of activations on a process of each pipeline stage at their peak.

    Like `memory.activation_memory`, with the norms before the output layer, which count where a vocabulary is
    small. Where layers are computed again, one of them is whole at a time: that of multi-token prediction
    beside the logits, any other one without them.
    """
    model, run, tp = work.model, work.run, work.run.parallel.tensor_model_parallel_size
    width, norm = weight_bytes(model), _norm(model)
    modules = [module for module in run.recompute if module != "layer"]
    stages = pipeline_stages(model, work.vocab_size, run.parallel)
    filled = math.ceil(work.seq_length / CHUNK) * CHUNK / work.seq_length
    whole = {
        layer: cpu_layer_activations(model, layer, modules, filled)
        for layer in {*model.hybrid_layer_pattern, *model.mtp_hybrid_layer_pattern}
    }
    # Both norms before the joining projection and its input, the block's layers, and the norm after them.
    block = sum(whole[layer] for layer in model.mtp_hybrid_layer_pattern)
    depth = 3 * norm + width * model.hidden_size + block
    logits = (1 + model.mtp_num_layers) * FP32 * padded_vocab_size(model, work.vocab_size, tp)
    after = [0.0] * (len(stages) - 1) + [logits + norm]
    if "layer" in run.recompute:
        kept: list[float] = [width * model.hidden_size * len(stage) for stage in stages]
        after[-1] += depth if model.mtp_num_layers else 0
        largest = [max(whole[layer] for layer in stage) for stage in stages]
        after = [max(a, layer) for a, layer in zip(after, largest, strict=True)]
    else:
        kept = [sum(whole[layer] for layer in stage) for stage in stages]
        after[-1] += model.mtp_num_layers * depth
    under_way = range(len(stages), 0, -1)  # micro-batches, whose layers keep what they keep
    return [work.tokens_of_process / tp * (x * n + a) for x, n, a in zip(kept, under_way, after, strict=True)]


def cpu_layer_activations(model: Model, layer: str, recompute: Sequence[str], filled: float = 1.0) -> float:
    """Bytes that a layer keeps for each token, before tensor parallelism divides them.

    Mamba's scan keeps all that it makes, in fp32 whatever the precision of the model is, and of whole chunks:
    of a sequence that is filled up, `filled` times as much.
    """
    width = weight_bytes(model)
    if layer == "M":
        inner, _ = mamba_widths(model)
        gated_norm = (2 * FP32 + width) * inner
        return _norm(model) + FP32 * _scan(model) * filled + gated_norm
    if layer == "*":
        queries = model.num_attention_heads * model.kv_channels
        keys_values = 2 * model.num_query_groups * model.kv_channels
        # The projection's output, queries once more, and attention's output as it makes and as it gives it.
        return _norm(model) + width * (4 * queries + keys_values) + FP32 * model.num_attention_heads
    if layer == "-":
        return _norm(model) + (0 if "mlp" in recompute else 2 * width * model.ffn_hidden_size)
    if "moe" in recompute:
        return _norm(model)
    shared = 0 if "shared_experts" in recompute else 2 * model.moe_shared_expert_intermediate_size
    latent, topk = expert_width(model), model.moe_router_topk
    # In bf16 the weights of experts, which are fp32, are one step more.
    routed = topk * (latent + (2 if width == FP32 else 3) * model.moe_ffn_hidden_size)
    # Scores and their order for each expert, and what is known of the chosen ones.
    routing = 16 * model.num_moe_experts + 32 * topk
    return _norm(model) + width * (shared + routed + (latent if model.moe_latent_size else 0)) + routing


def _scan(model: Model) -> float:
    """Numbers of a token, by `mamba2_layer`."""
    inner, conv = mamba_widths(model)
    heads, groups, state = model.mamba_num_heads, model.mamba_num_groups, model.mamba_state_dim
    projected, convolved = inner + conv + heads, 2 * conv + 2 * groups * state
    steps, pairs = 3 * heads, CHUNK * (groups + 2 * heads)
    decayed, states = 2 * heads * state, inner * state / CHUNK
    ends = 2 * inner  # its input times the step, and its output
    return projected + convolved + steps + pairs + decayed + states + ends


def _norm(model: Model) -> float:
    """Bytes of a token: a norm's input and what it makes of it in fp32, and the input of what follows."""
    return (2 * FP32 + weight_bytes(model)) * model.hidden_size
