"""What config.json says: read, without effect, refused, or named because nobody reads it."""

from __future__ import annotations

import json
import math
from pathlib import Path

from snaketron.config import load
from snaketron.huggingface.config import differences, unread

import pytest
import yaml
from transformers import NemotronHConfig

SUPER = load(yaml.safe_load((Path(__file__).parents[3] / "config/super.yaml").read_text()), {}).model
# The keys of published files, which have JSON's unofficial Infinity, with the sizes of Nemotron 3 Super.
PUBLISHED = json.loads("""{
  "architectures": ["NemotronHForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"}, "bos_token_id": 1,
  "chunk_size": 128, "conv_kernel": 4, "eos_token_id": 2, "expand": 2, "head_dim": 128,
  "hidden_dropout": 0.0, "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 2688,
  "layer_norm_epsilon": 1e-05, "mamba_head_dim": 64, "mamba_hidden_act": "silu", "mamba_num_heads": 128,
  "mamba_proj_bias": false, "mamba_ssm_cache_dtype": "float32", "max_position_embeddings": 262144,
  "mlp_bias": false, "mlp_hidden_act": "relu2", "model_type": "nemotron_h", "moe_intermediate_size": 2688,
  "moe_latent_size": 1024, "moe_shared_expert_intermediate_size": 5376, "moe_shared_expert_overlap": false,
  "mtp_hybrid_override_pattern": "*E", "n_group": 1, "n_groups": 8, "n_routed_experts": 512,
  "n_shared_experts": 1, "norm_eps": 1e-05, "norm_topk_prob": true, "num_attention_heads": 32,
  "num_experts_per_tok": 22, "num_hidden_layers": 88, "num_key_value_heads": 2, "num_logits_to_keep": 1,
  "num_nextn_predict_layers": 1, "pad_token_id": 0, "partial_rotary_factor": 1.0,
  "rescale_prenorm_residual": true, "residual_in_fp32": false, "rope_theta": 10000,
  "routed_scaling_factor": 5.0, "sliding_window": null, "ssm_state_size": 128, "tie_word_embeddings": false,
  "time_step_floor": 0.0001, "time_step_limit": [0.0, Infinity], "time_step_max": 0.1,
  "time_step_min": 0.001, "topk_group": 1, "torch_dtype": "bfloat16", "transformers_version": "4.55.4",
  "use_bias": false, "use_cache": true, "use_conv_bias": true, "use_mamba_kernels": true,
  "vocab_size": 131072}""") | {"hybrid_override_pattern": SUPER.hybrid_layer_pattern}


def test_a_published_configuration_passes_without_a_word():
    assert (differences(PUBLISHED, SUPER, 131072), unread(PUBLISHED)) == ([], "")


@pytest.mark.parametrize("whole", [False, True])
def test_what_transformers_makes_of_it_passes_without_a_word(whole: bool):
    """It lists the kinds of the layers, and writes infinity as an object; with and without all defaults."""
    values = json.loads(NemotronHConfig(**PUBLISHED).to_json_string(use_diff=not whole))
    assert "hybrid_override_pattern" not in values and "layers_block_type" in values
    assert values["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert (differences(values, SUPER, 131072), unread(values)) == ([], "")


def test_what_changes_the_function_is_refused():
    pattern = SUPER.hybrid_layer_pattern
    changed = PUBLISHED | {
        "sliding_window": 4096,
        "quantization_config": {"quant_method": "modelopt"},
        "time_step_limit": [0.0, 0.1],
        "layers_block_type": ["mamba", "moe"],
    }
    assert differences(changed, SUPER, 131072) == [
        f"hybrid_override_pattern: {pattern} in the checkpoint, whose layers_block_type is ME",
        "sliding_window: 4096 in the checkpoint; only None is supported",
        "quantization_config: {'quant_method': 'modelopt'} in the checkpoint; only None is supported",
        "time_step_limit: [0.0, 0.1] in the checkpoint; only [0, Infinity] is supported",
    ]


@pytest.mark.parametrize("limit", [None, (0, math.inf), [0, "Infinity"]])
def test_a_limit_that_limits_nothing_is_none(limit):
    assert differences(PUBLISHED | {"time_step_limit": limit}, SUPER, 131072) == []


def test_what_nobody_reads_is_named_where_it_says_something():
    nothing = {"rope_scaling": None, "use_qk_norm": False, "some_layers": [], "_commit_hash": "0a1b"}
    assert unread(PUBLISHED | nothing) == ""
    said = unread(PUBLISHED | nothing | {"logit_scale": 0.5, "rope_scaling": {"factor": 4.0}})
    assert said == (
        "config.json says rope_scaling: {'factor': 4.0}, logit_scale: 0.5, which is not read here; where "
        "that changes what the model computes, the imported one computes something else"
    )
