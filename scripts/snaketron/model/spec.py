"""The architecture of Nemotron 3 Super, at any size, as megatron-core builds it.

Source of the choices: NVIDIA's training recipe and configuration of Nemotron 3 Super 120B-A12B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from snaketron.config import Cluster, Model, Parallel, Run
from snaketron.config.base import FLEXIBLE
from snaketron.model import backend
from snaketron.model.megatron import corrections
from snaketron.sizes.layout import dispatcher
from snaketron.sizes.parameters import padded_vocab_size
from snaketron.sizes.stages import pipeline_stages

import torch
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.quantization.quant_config import GlobMatcher, RecipeConfig
from megatron.core.transformer import TransformerConfig

# TransformerConfig fields of a precision below bf16. Gradients have a wider range and less precision (e5m2).
LOW_PRECISION: dict[str, dict[str, Any]] = {
    "fp8_delayed": {
        "fp8": "hybrid",
        "fp8_recipe": "delayed",
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
    },
    "fp8_current": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "fp8_blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},  # scales of 1 x 128 and 128 x 128 blocks
    "nvfp4": {"fp4": "e2m1", "fp4_recipe": "nvfp4"},
}
# Which modules of Nemotron 3 Super stay in bf16 or mxfp8 under nvfp4; the others are nvfp4. Source:
# te_quant.cfg of Megatron-Bridge's recipes for it.
NVFP4_EXCEPTIONS = {
    "*.linear_qkv": "bf16",
    "*.linear_proj": "bf16",
    "*mlp.fc[12]_latent_proj": "bf16",
    "mtp.*": "bf16",
    "*mixer.out_proj": "mxfp8",
}
_TE = {"transformer_engine_config_type": "TEQuantizationParams"}
_QUANTIZATION = {
    "bf16": _TE | {"training_recipe": {}},
    "mxfp8": _TE | {"training_recipe": {"fp8_quantization_recipe": "mxfp8"}},
    "nvfp4": _TE | {"training_recipe": {"fp4_quantization_recipe": "nvfp4"}},
}


def quantization_recipe() -> RecipeConfig:
    """How each module is quantized under nvfp4: by the first pattern that fits its name."""
    return RecipeConfig(
        [GlobMatcher(pattern, kind) for pattern, kind in (NVFP4_EXCEPTIONS | {"*": "nvfp4"}).items()],
        _QUANTIZATION,
    )


def low_precision(model: Model) -> dict[str, Any]:
    """TransformerConfig fields of a precision below bf16; none for fp32 and bf16."""
    fields = dict(LOW_PRECISION.get(model.precision, {}))
    if fields and model.bf16_layers_at_end:
        fields |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": 0,
            "num_layers_at_end_in_bf16": model.bf16_layers_at_end,
        }
    if model.precision == "nvfp4":
        fields["quant_recipe"] = quantization_recipe()
    return fields


def recomputation(modules: Sequence[str]) -> dict[str, Any]:
    """TransformerConfig fields that say what the backward pass computes again."""
    if "layer" in modules:
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if of_megatron := [module for module in modules if module != "scan"]:
        return {"recompute_granularity": "selective", "recompute_modules": of_megatron}
    return {}


def dispatching(model: Model, run: Run, cluster: Cluster) -> dict[str, Any]:
    """TransformerConfig fields that say how tokens reach the experts of other processes."""
    fields: dict[str, Any] = {"moe_shared_expert_overlap": run.moe_shared_expert_overlap}
    chosen = dispatcher(model, run, cluster)
    if chosen in FLEXIBLE:
        return fields | {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": chosen}
    return fields | {"moe_token_dispatcher_type": chosen}


def dtype_of(model: Model) -> torch.dtype:
    """The type of weights, and of activations between products."""
    return torch.float32 if model.precision == "fp32" else torch.bfloat16


def transformer_config(model: Model, parallel: Parallel, **overrides: Any) -> TransformerConfig:
    """Everything about the model but its layer pattern and vocabulary.

    Args:
        model: sizes, and weights of the losses.
        parallel: the layout; sequence parallelism comes with tensor parallelism.
        overrides: TransformerConfig fields, such as recomputation.

    Raises:
        ValueError: megatron-core refuses the combination.
    """
    dtype = dtype_of(model)
    fields: dict[str, Any] = {
        "num_layers": len(model.hybrid_layer_pattern),
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.kv_channels,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.layernorm_epsilon,
        "activation_func": squared_relu,
        "gated_linear_unit": False,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": model.init_method_std,
        "is_hybrid_model": True,
        "mamba_num_heads": model.mamba_num_heads,
        "mamba_head_dim": model.mamba_head_dim,
        "mamba_state_dim": model.mamba_state_dim,
        "mamba_num_groups": model.mamba_num_groups,
        "num_moe_experts": model.num_moe_experts,
        "moe_router_topk": model.moe_router_topk,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
        "moe_latent_size": model.moe_latent_size,
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
        # Sigmoid scores; a bias that only selects evens the load: DeepSeek-V3 (arXiv 2412.19437), 2.1.2.
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": model.moe_router_bias_update_rate,
        "moe_router_topk_scaling_factor": model.moe_router_topk_scaling_factor,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "mtp_num_layers": model.mtp_num_layers or None,
        "mtp_use_repeated_layer": model.mtp_num_layers > 0,
        "mtp_loss_scaling_factor": model.mtp_loss_scaling_factor,
        "calculate_per_token_loss": True,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size,
        "sequence_parallel": parallel.tensor_model_parallel_size > 1,
        **low_precision(model),
        **backend.transformer_config_options(),
    }
    return TransformerConfig(**{**fields, **overrides})


def build_model(
    config: TransformerConfig, model: Model, parallel: Parallel, vocab_size: int, seq_length: int
) -> HybridModel:
    """This rank's part of the model, with random weights; megatron's parallel state must be set up.

    Args:
        config: of `transformer_config`.
        model: layer patterns and padding of the vocabulary.
        parallel: the layout, which divides the layers.
        vocab_size: tokens of the tokenizer, before padding.
        seq_length: tokens of the longest sequence.

    Returns:
        A HybridModel. Called with input_ids, position_ids (both (batch, length)) and attention_mask None,
        it gives logits (batch, length, padded vocabulary / TP), or with labels the loss of each token
        (batch, length) in nats; loss_mask is then as in `packed.process_mtp_loss`. padding_mask (batch,
        length / TP), true for padding, keeps tokens out of the routers' losses and loads.
        Expert parameters are marked `allreduce = False`.
    """
    pattern = "/".join(
        ["|".join(pipeline_stages(model, vocab_size, parallel))]
        + [model.mtp_hybrid_layer_pattern] * model.mtp_num_layers
    )
    built = HybridModel(
        config,
        backend.hybrid_stack_spec(),
        vocab_size=padded_vocab_size(model, vocab_size, config.tensor_model_parallel_size),
        max_sequence_length=seq_length,
        hybrid_layer_pattern=pattern,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="none",
    )
    corrections.correct(built, config)
    backend.prepare_model(built)
    return built
