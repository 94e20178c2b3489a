"""config.json of a published checkpoint: what it says about a model, and how it differs from a configuration.

The keys are those of transformers' NemotronHConfig and of the published files; vLLM reads the same ones. The
files of the tokenizer, which a checkpoint has beside it, are named here too.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snaketron.config import Model
from snaketron.huggingface.index import tensor_names
from snaketron.log import UserError
from snaketron.sizes.parameters import CONV_WIDTH

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

LETTERS = {
    "M": "linear_attention",
    "E": "moe",
    "*": "full_attention",
    "-": "mlp",
}
# Names that older files give the layers.
_KINDS = {kind: letter for letter, kind in LETTERS.items()} | {"mamba": "M", "attention": "*"}

# Sizes by their published key; and the letters of the layers that have them.
_SIZES: dict[str, tuple[str, str]] = {
    "hidden_size": ("hidden_size", "ME*-"),
    "layer_norm_epsilon": ("layernorm_epsilon", "ME*-"),
    "intermediate_size": ("ffn_hidden_size", "-"),
    "num_attention_heads": ("num_attention_heads", "*"),
    "num_key_value_heads": ("num_query_groups", "*"),
    "head_dim": ("kv_channels", "*"),
    "mamba_num_heads": ("mamba_num_heads", "M"),
    "mamba_head_dim": ("mamba_head_dim", "M"),
    "ssm_state_size": ("mamba_state_dim", "M"),
    "n_groups": ("mamba_num_groups", "M"),
    "n_routed_experts": ("num_moe_experts", "E"),
    "num_experts_per_tok": ("moe_router_topk", "E"),
    "moe_intermediate_size": ("moe_ffn_hidden_size", "E"),
    "moe_latent_size": ("moe_latent_size", "E"),
    "moe_shared_expert_intermediate_size": ("moe_shared_expert_intermediate_size", "E"),
    "routed_scaling_factor": ("moe_router_topk_scaling_factor", "E"),
}
_OTHER_NAMES = {"head_dim": "attention_head_dim"}
_OPTIONAL = {"moe_latent_size"}  # a file without it has no latent space

# What this architecture always is. A file may leave these out; it must not say otherwise.
_FIXED: dict[str, tuple[Any, str]] = {
    "use_conv_bias": (True, "M"),
    "conv_kernel": (CONV_WIDTH, "M"),
    "use_bias": (False, "M"),
    "mamba_proj_bias": (False, "M"),
    "mamba_hidden_act": ("silu", "M"),
    "attention_bias": (False, "*"),
    "sliding_window": (None, "*"),
    "mlp_bias": (False, "E-"),
    "mlp_hidden_act": ("relu2", "E-"),
    "n_group": (1, "E"),
    "topk_group": (1, "E"),
    "n_shared_experts": (1, "E"),
    "tie_word_embeddings": (False, "ME*-"),
    "residual_in_fp32": (False, "ME*-"),
    "quantization_config": (None, "ME*-"),
}

# Keys of transformers 5.23 and of published files that change nothing that this architecture computes.
_WITHOUT_EFFECT = {
    "the file": "model_type architectures auto_map transformers_version dtype torch_dtype id2label label2id",
    "what is returned": "return_dict output_router_logits use_cache num_logits_to_keep",
    "ids that the tokenizer has": "bos_token_id eos_token_id pad_token_id",
    "said by other keys": "num_hidden_layers expand norm_eps",
    "first weights": "initializer_range rescale_prenorm_residual time_step_min time_step_max time_step_floor",
    "trainings elsewhere": "attention_dropout hidden_dropout moe_shared_expert_overlap keep_mtp_spec_in_bf16",
    "kernels and caches": "chunk_size use_mamba_kernels mamba_ssm_cache_dtype",
    "positions, which attention does not use": "max_position_embeddings rope_theta partial_rotary_factor",
}
# Keys that `differences` reads beside the tables above.
_READ = {
    *("vocab_size", "norm_topk_prob", "num_nextn_predict_layers", "time_step_limit"),
    *("hybrid_override_pattern", "mtp_hybrid_override_pattern"),
    *("layers_block_type", "mtp_layers_block_type"),
}


def copy_tokenizer(tokenizer: Path, target: Path) -> list[str]:
    """Put the files of a tokenizer and its template into a directory; the names of those that there are."""
    target.mkdir(exist_ok=True)
    found = [name for name in TOKENIZER_FILES if (tokenizer / name).exists()]
    for name in found:
        shutil.copyfile(tokenizer / name, target / name)
    return found


def token_ids(path: Path, made: Mapping[str, Any] | None = None) -> dict[str, int]:
    """The id of each token of a tokenizer.json, which says `made`; `UserError` where it is none."""
    try:
        made = json.loads(path.read_bytes()) if made is None else made
        vocabulary = made["model"]["vocab"]
        if isinstance(vocabulary, list):  # of a unigram model, with scores
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        return {**vocabulary, **{token["content"]: token["id"] for token in made.get("added_tokens") or ()}}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a tokenizer ({error})") from None


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a published checkpoint, as `of_files` gives it; `UserError` where there is none."""
    path = directory / "config.json"
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a published checkpoint has one") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); download or copy it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a configuration of a model; download or copy it again")
    return of_files(found, directory)


def of_files(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    """config.json without multi-token prediction where the files of a directory hold nothing of it.

    transformers saves a model without it, and keeps the key.
    """
    names = tensor_names(directory)
    lost = "lm_head.weight" in names and not any(name.startswith("mtp.") for name in names)
    return config | {"num_nextn_predict_layers": 0} if lost else config


def published(
    model: Model,
    *,
    vocab_size: int,
    seq_length: int,
    dtype: str,
    eos_token_id: int,
    pad_token_id: int,
) -> dict[str, Any]:
    """config.json of a model, as transformers and vLLM read it.

    Args:
        vocab_size: tokens, without padding.
        seq_length: tokens of the longest sequence that it was trained on. There is no position embedding, so
            it is no limit.
        dtype: float32 or bfloat16.
    """
    values: dict[str, Any] = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "vocab_size": vocab_size,
        "hybrid_override_pattern": model.hybrid_layer_pattern,
        "num_hidden_layers": len(model.hybrid_layer_pattern),
        **{name: getattr(model, key) for name, (key, _) in _SIZES.items()},
        **{name: value for name, (value, _) in _FIXED.items()},
        # megatron-core takes the score of a single expert as it is.
        "norm_topk_prob": model.moe_router_topk > 1,
        "num_nextn_predict_layers": min(1, model.mtp_num_layers),  # its depths share one block
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "chunk_size": 128,
        "expand": 2,
        "initializer_range": model.init_method_std,
        "rescale_prenorm_residual": True,
        "mamba_ssm_cache_dtype": "float32",
        "max_position_embeddings": seq_length,
        "num_logits_to_keep": 1,
        # transformers clamps the time step of Mamba-2 at this value, which was meant for first weights, and
        # megatron-core does not clamp it. After a training many steps are below the usual 0.001.
        "time_step_min": 1e-12,
        "time_step_max": 0.1,
        "time_step_floor": 1e-4,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "torch_dtype": dtype,
    }
    if model.mtp_num_layers:
        values["mtp_hybrid_override_pattern"] = model.mtp_hybrid_layer_pattern
    return values


def differences(config: Mapping[str, Any], model: Model, vocab_size: int | None) -> list[str]:
    """Everything in which a config.json is not of this model, a line each; none where they agree.

    `vocab_size` counts the tokenizer's tokens, where it is known: the checkpoint needs a row for each.
    """
    if (kind := config.get("model_type")) != "nemotron_h":
        return [f"model_type: {kind!r} in the checkpoint; only nemotron_h has this architecture"]
    problems = _patterns(config, model)
    letters = set(model.hybrid_layer_pattern)
    if model.mtp_num_layers:
        letters |= set(model.mtp_hybrid_layer_pattern)
    for name, (key, where) in _SIZES.items():
        if letters & set(where):
            problems += _size(config, name, key, getattr(model, key))
    fixed = {name: value for name, (value, where) in _FIXED.items() if letters & set(where)}
    if "E" in letters:
        fixed["norm_topk_prob"] = model.moe_router_topk > 1
        if not fixed["norm_topk_prob"] and "norm_topk_prob" not in config:
            problems.append("norm_topk_prob: missing in the checkpoint, and with one expert it must be false")
    problems += [
        f"{name}: {config[name]!r} in the checkpoint; only {value!r} is supported"
        for name, value in fixed.items()
        if name in config and config[name] != value
    ]
    if "M" in letters and not _is_unlimited(limit := config.get("time_step_limit")):
        problems.append(f"time_step_limit: {limit!r} in the checkpoint; only [0, Infinity] is supported")
    if "vocab_size" not in config:
        problems.append("vocab_size: missing in the checkpoint")
    elif not isinstance(config["vocab_size"], int):
        problems.append(_no_number("vocab_size", config["vocab_size"]))
    elif vocab_size is not None and config["vocab_size"] < vocab_size:
        problems.append(
            f"vocab_size: {config['vocab_size']} in the checkpoint, fewer than the {vocab_size} tokens of "
            "the tokenizer"
        )
    return problems


def unread(config: Mapping[str, Any]) -> str:
    """A sentence about the keys that nothing here knows; empty where there are none, or they say nothing."""
    known = {*_READ, *_SIZES, *_OTHER_NAMES.values(), *_FIXED}
    known |= {name for names in _WITHOUT_EFFECT.values() for name in names.split()}
    found = [
        f"{name}: {value!r}"
        for name, value in config.items()
        if value and name not in known and not name.startswith("_")
    ]
    if not found:
        return ""
    return (
        f"config.json says {', '.join(found)}, which is not read here; where that changes what the model "
        "computes, the imported one computes something else"
    )


def stated_length(config: Mapping[str, Any]) -> int:
    """The longest sequence that a file speaks of; 0 where it says nothing."""
    length = config.get("max_position_embeddings")
    return length if isinstance(length, int) else 0


def stated_deviation(config: Mapping[str, Any]) -> float:
    """The standard deviation of the first weights that a file speaks of; 0 where it says nothing."""
    deviation = config.get("initializer_range")
    return deviation if isinstance(deviation, float) and 0 < deviation < math.inf else 0.0


def ends_of_answers(directory: Path) -> list[int]:
    """The ids at which generation_config.json of a published checkpoint ends an answer; none without one."""
    path = directory / "generation_config.json"
    try:
        found = json.loads(path.read_bytes()).get("eos_token_id")
    except FileNotFoundError:
        return []
    except (ValueError, AttributeError):
        raise UserError(f"{path}: not a JSON object; download or copy it again") from None
    return [end for end in (found if isinstance(found, list) else [found]) if isinstance(end, int)]


def _is_unlimited(limit: Any) -> bool:
    """Whether a range of time steps leaves them as they are; JSON has no infinity, so files differ."""
    if limit is None:
        return True
    try:
        low, high = (float(end["__float__"] if isinstance(end, dict) else end) for end in limit)
    except (TypeError, ValueError, KeyError):
        return False
    return low <= 0 and high == math.inf


def _patterns(config: Mapping[str, Any], model: Model) -> list[str]:
    there, problems = _pattern(config), []
    if there is None:
        problems.append("hybrid_override_pattern: missing in the checkpoint (layers_block_type too)")
    elif there != model.hybrid_layer_pattern:
        problems.append(_differ("hybrid_layer_pattern", there, model.hybrid_layer_pattern))
    kinds = _of_kinds(config)
    if there and kinds and there != kinds:  # transformers would take the kinds, and vLLM the pattern
        problems.append(
            f"hybrid_override_pattern: {there} in the checkpoint, whose layers_block_type is {kinds}"
        )
    depths = config.get("num_nextn_predict_layers", 0)
    if not isinstance(depths, int):
        problems.append(_no_number("num_nextn_predict_layers", depths))
    elif depths > 1:
        problems.append(
            f"num_nextn_predict_layers: {depths} in the checkpoint; only 1, a block that all depths share, "
            "is supported"
        )
    elif bool(depths) != bool(model.mtp_num_layers):
        has, fix = ("no", "set it to 0") if model.mtp_num_layers else ("a", "set it to 1 or more")
        problems.append(
            f"model.mtp_num_layers: {model.mtp_num_layers} in the configuration, and the checkpoint has "
            f"{has} block of multi-token prediction; {fix}"
        )
    elif depths and (block := _pattern(config, "mtp_") or "*E") != model.mtp_hybrid_layer_pattern:
        problems.append(_differ("mtp_hybrid_layer_pattern", block, model.mtp_hybrid_layer_pattern))
    return problems


def _pattern(config: Mapping[str, Any], prefix: str = "") -> str | None:
    """The letters of the layers; None where the file has none."""
    written = config.get(f"{prefix}hybrid_override_pattern")
    return _of_kinds(config, prefix) if written is None else written


def _of_kinds(config: Mapping[str, Any], prefix: str = "") -> str | None:
    """The letters of the layers whose kinds are listed; None where they are not."""
    kinds = config.get(f"{prefix}layers_block_type")
    if not kinds:
        return None
    return "".join(_KINDS.get(str(kind), "?") for kind in (kinds if isinstance(kinds, list) else [kinds]))


def _size(config: Mapping[str, Any], name: str, key: str, here: Any) -> list[str]:
    name = name if name in config else _OTHER_NAMES.get(name, name)
    if name not in config and name not in _OPTIONAL:
        return [f"{name}: missing in the checkpoint"]
    there = config.get(name)
    return [] if there == here else [_differ(key, there, here)]


def _no_number(name: str, value: Any) -> str:
    return f"{name}: {value!r} in the checkpoint is no whole number"


def _differ(key: str, there: Any, here: Any) -> str:
    if str(there) == str(here):  # a number that is written as text
        there, here = repr(there), repr(here)
    return f"model.{key}: {there} in the checkpoint, {here} in the configuration"
