"""The model against an independent implementation: transformers' NemotronH with the same weights."""

from snaketron.config import Model

import pytest
import torch

EXPERTS, HIDDEN, KV_GROUPS, QUERIES_OF_A_GROUP, HEAD_DIM = 8, 128, 2, 4, 16


def huggingface_model(pattern):
    from transformers import NemotronHConfig, NemotronHForCausalLM

    model = Model()
    config = NemotronHConfig(
        vocab_size=256,
        hybrid_override_pattern=pattern,
        num_hidden_layers=len(pattern),
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.kv_channels,
        ssm_state_size=model.mamba_state_dim,
        mamba_num_heads=model.mamba_num_heads,
        mamba_head_dim=model.mamba_head_dim,
        n_groups=model.mamba_num_groups,
        conv_kernel=4,
        chunk_size=64,
        n_routed_experts=model.num_moe_experts,
        num_experts_per_tok=model.moe_router_topk,
        moe_intermediate_size=model.moe_ffn_hidden_size,
        moe_latent_size=model.moe_latent_size,
        moe_shared_expert_intermediate_size=model.moe_shared_expert_intermediate_size,
        routed_scaling_factor=model.moe_router_topk_scaling_factor,
        norm_topk_prob=True,
        # transformers clamps the step size from below, megatron-core does not.
        time_step_min=1e-12,
    )
    return NemotronHForCausalLM(config).float().eval()


def layer_weights(kind, w):
    """transformers' names of a layer's weights, from megatron-core's."""
    if kind == "M":
        names = ("in_proj.weight", "out_proj.weight", "dt_bias", "A_log", "D", "norm.weight")
        yield "norm.weight", w["mixer.in_proj.layer_norm_weight"]
        yield from (("mixer." + name, w["mixer." + name]) for name in names)
        yield from ((f"mixer.conv1d.{name}", w[f"mixer.conv1d_{name}"]) for name in ("weight", "bias"))
    elif kind == "*":
        qkv = w["self_attention.linear_qkv.weight"].view(KV_GROUPS, QUERIES_OF_A_GROUP + 2, HEAD_DIM, HIDDEN)
        yield "norm.weight", w["self_attention.linear_qkv.layer_norm_weight"]
        for name, part in zip("qkv", qkv.split([QUERIES_OF_A_GROUP, 1, 1], 1), strict=True):
            yield f"mixer.{name}_proj.weight", part.reshape(-1, HIDDEN)
        yield "mixer.o_proj.weight", w["self_attention.linear_proj.weight"]
    else:
        yield "norm.weight", w["pre_mlp_layernorm.weight"]
        yield "mixer.gate.weight", w["mlp.router.weight"]
        yield "mixer.gate.e_score_correction_bias", w["mlp.router.expert_bias"]
        for theirs, ours in (("up_proj", "linear_fc1"), ("down_proj", "linear_fc2")):
            experts = [w[f"mlp.experts.local_experts.{e}.{ours}.weight"] for e in range(EXPERTS)]
            yield f"mixer.experts.{theirs}", torch.stack(experts)
            yield f"mixer.shared_experts.{theirs}.weight", w[f"mlp.shared_experts.{ours}.weight"]
        for name in ("fc1_latent_proj", "fc2_latent_proj"):
            yield f"mixer.{name}.weight", w[f"mlp.{name}.weight"]


def huggingface_weights(pattern, weights):
    result = {
        "model.embeddings.weight": weights["embedding.word_embeddings.weight"],
        "model.norm_f.weight": weights["decoder.final_norm.weight"],
        "lm_head.weight": weights["output_layer.weight"],
    }
    for i, kind in enumerate(pattern):
        prefix = f"decoder.layers.{i}."
        layer = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        result.update({f"model.layers.{i}.{name}": w for name, w in layer_weights(kind, layer)})
    return result


@pytest.mark.parametrize("pattern", ["M", "*", "E", "MEM*EME"])
@torch.no_grad()
def test_logits_are_those_of_transformers(build, pattern):
    model = build(hybrid_layer_pattern=pattern, mtp_num_layers=0, init_method_std=0.1).eval()
    for module in model.modules():
        if getattr(module, "expert_bias", None) is not None:
            module.expert_bias.normal_(std=0.1)  # so that it decides for some tokens
    theirs = huggingface_model(pattern)
    theirs.load_state_dict(huggingface_weights(pattern, model.state_dict()), strict=True)
    ids = torch.randint(0, 256, (2, 150))
    torch.testing.assert_close(
        model(ids, None, None), theirs(ids, use_cache=False).logits, atol=1e-4, rtol=1e-4
    )
