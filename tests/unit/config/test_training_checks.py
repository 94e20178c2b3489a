"""What does not fit in one training is refused in the dry-run: how tokens are dispatched, sizes in fp8."""

from __future__ import annotations

from typing import Any

from snaketron.config import ConfigError, load

import pytest

BF16 = {"precision": "bf16"}
EP = {"expert_model_parallel_size": 2, "data_parallel_size": 2}


def config(model: dict[str, Any], **pretrain: Any) -> dict[str, Any]:
    return {"model": model, "pretrain": {"global_batch_size": 16} | pretrain}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            config({}, moe_token_dispatcher="hybridep"),
            "pretrain.moe_token_dispatcher hybridep sends tokens in bf16, and model.precision is fp32",
        ),
        (
            config(BF16, moe_token_dispatcher="deepep"),
            "pretrain.moe_token_dispatcher deepep needs experts on several processes: raise pretrain.",
        ),
        (
            config(BF16, moe_shared_expert_overlap=True),
            r"pretrain.moe_shared_expert_overlap: megatron-core has no overlap for experts in a latent space",
        ),
        (
            config({"moe_latent_size": None}, moe_shared_expert_overlap=True, recompute=["shared_experts"]),
            "pretrain.moe_shared_expert_overlap and shared_experts in pretrain.recompute: leave one of",
        ),
        (config(BF16, moe_token_dispatcher="gather"), "pretrain.moe_token_dispatcher: input should be"),
        (
            config(BF16, moe_token_dispatcher="allgather", parallel=EP | {"expert_tensor_parallel_size": 2}),
            "pretrain.moe_token_dispatcher allgather takes whole experts",
        ),
        (
            config(
                {"moe_latent_size": None}, moe_token_dispatcher="allgather", moe_shared_expert_overlap=True
            ),
            "pretrain.moe_token_dispatcher allgather leaves nothing to overlap with",
        ),
    ],
)
def test_what_megatron_core_would_refuse_is_refused_before(values, message: str):
    with pytest.raises(ConfigError, match=message):
        load(values, {})


def test_what_fits_is_taken():
    found = load(config(BF16, moe_token_dispatcher="deepep", parallel=EP), {})
    assert found.training("pretrain/broad").run.moe_token_dispatcher == "deepep"
    load(config({"moe_latent_size": None}, moe_shared_expert_overlap=True), {})


# 16 heads of 16: in_proj has 2 * 256 inner numbers, 2 * 1 * 32 states and 16 steps.
FP8 = {"precision": "fp8_current", "mamba_num_heads": 16, "mamba_head_dim": 16}
WIDTHS = "needs widths that are multiples of 16, and decoder.layers.mixer.in_proj has"
TOKENS = "needs micro-batches of a multiple of 16 tokens, and micro_batch_size 1 x"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            config({"precision": "fp8_delayed"}),
            f"model.precision fp8_delayed {WIDTHS} 584 outputs; change the sizes of the model, or take bf16",
        ),
        (
            config(FP8, parallel={"tensor_model_parallel_size": 2}),
            f"model.precision fp8_current {WIDTHS} 592 outputs, 296 for each of "
            "pretrain.parallel.tensor_model_parallel_size 2; change the sizes of the model, or take bf16",
        ),
        (
            config(FP8, micro_batch_size=1, seq_length=1032),
            f"model.precision fp8_current {TOKENS} pretrain.seq_length 1032 has 1032",
        ),
        (
            config(
                FP8 | {"mamba_num_heads": 32},
                parallel={"tensor_model_parallel_size": 2},
                micro_batch_size=1,
                seq_length=1040,
            ),
            f"model.precision fp8_current {TOKENS.replace('16', '32')} pretrain.seq_length 1040 has 1040",
        ),
        (
            config(FP8) | {"sft": {"precision": "fp8_current"}, "sft_data": {"pack_size": 504}},
            f"sft.precision fp8_current {TOKENS} sft_data.pack_size 504 has 504",
        ),
    ],
)
def test_what_transformer_engine_does_not_multiply_in_fp8_is_refused(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as refused:
        load(values, {})
    assert message in str(refused.value).splitlines()


TWO_STAGES = {"pipeline_model_parallel_size": 2}
OFFLOADED = {"offload_optimizer": 0.5}
IN_PARTS = {"context_parallel_size": 2}
ON_GPUS = {"cluster": {"gpus_per_node": 2}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            config(FP8 | {"precision": "fp8_delayed", "bf16_layers_at_end": 1}),
            "model.precision fp8_delayed takes no model.bf16_layers_at_end (1); set it to 0, or take "
            "fp8_current",
        ),
        (  # the pattern has six layers
            config(FP8 | {"bf16_layers_at_end": 4}, parallel=TWO_STAGES),
            "model.bf16_layers_at_end 4 is more than 3, and under model.precision fp8_current megatron-core "
            "takes no more than 6 layers / 2 stages of pretrain.parallel",
        ),
        (
            config(FP8 | {"precision": "fp8_delayed"}, recompute=["moe", "layernorm"]),
            "pretrain.recompute: no layernorm under model.precision fp8_delayed; leave it out",
        ),
        (
            config(FP8 | {"precision": "fp8_delayed"}, recompute=["layer"]),
            "pretrain.recompute: no layer under model.precision fp8_delayed with multi-token prediction, "
            "whose layers would be computed with scales of steps long ago; take fp8_current",
        ),
        (
            config(BF16, recompute=["layer"], cuda_graphs=True),
            "pretrain.recompute: layer is not computed again where layers are recorded; leave it out, or "
            "pretrain.cuda_graphs true",
        ),
        (
            config(BF16, recompute=["moe", "shared_experts"], cuda_graphs=True),
            "pretrain.recompute: moe is not computed again where layers are recorded; leave it out, or "
            "pretrain.cuda_graphs true",
        ),
        (
            config({}, parallel=IN_PARTS) | ON_GPUS,
            "pretrain.parallel.context_parallel_size 2 needs bf16 on GPUs, and model.precision is fp32: "
            "Transformer Engine has no attention in fp32 that shares a sequence",
        ),
        (
            config(BF16 | {"moe_latent_size": 36}) | ON_GPUS,
            "model.moe_latent_size 36: routed experts on GPUs need a multiple of 8 in bf16 and fp8",
        ),
        (
            config(
                BF16 | {"moe_ffn_hidden_size": 24},
                parallel={"expert_tensor_parallel_size": 2, "data_parallel_size": 2},
            )
            | ON_GPUS,
            "model.moe_ffn_hidden_size 24 / pretrain.parallel.expert_tensor_parallel_size 2: routed experts "
            "on GPUs need a multiple of 8 in bf16 and fp8",
        ),
        (
            config({}, **OFFLOADED),
            "pretrain.offload_optimizer 0.5 needs weights in bf16, and model.precision is fp32; take bf16 or "
            "below",
        ),
        (
            config(BF16, **OFFLOADED, optimizer={"moment_precision": "bf16"}),
            "pretrain.offload_optimizer 0.5 keeps moments in fp32, on the GPU too: set pretrain.optimizer"
            ".moment_precision to fp32, or offload nothing",
        ),
    ],
)
def test_what_a_job_would_refuse_or_do_otherwise_is_refused_before(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as refused:
        load(values, {})
    assert message in str(refused.value).splitlines()


@pytest.mark.parametrize(
    "values",
    [
        config(FP8 | {"bf16_layers_at_end": 3}, parallel=TWO_STAGES),
        config(FP8, recompute=["layernorm"]),
        config(FP8, recompute=["layer"]),
        config(FP8 | {"precision": "fp8_delayed", "mtp_num_layers": 0}, recompute=["layer"]),
        config(BF16, recompute=["shared_experts", "scan"], cuda_graphs=True),
        config({}, parallel=IN_PARTS),  # on CPUs
        config(BF16, parallel=IN_PARTS) | ON_GPUS,
        config({"moe_latent_size": 36}) | ON_GPUS,  # in fp32 by Transformer Engine
        config(BF16 | {"moe_latent_size": 36}),  # on CPUs
        config(BF16 | {"moe_latent_size": None, "hybrid_layer_pattern": "M*", "moe_ffn_hidden_size": 9})
        | ON_GPUS,
        config(BF16, **OFFLOADED),
    ],
)
def test_what_a_job_does_is_not_refused(values: dict[str, Any]):
    load(values, {})


def test_layers_that_stay_in_bf16_and_routed_experts_have_any_width_under_fp8():
    pattern = {"hybrid_layer_pattern": "*E*EM", "mtp_num_layers": 0}
    odd = {"precision": "fp8_current", "moe_ffn_hidden_size": 40}
    load(config(pattern | odd | {"bf16_layers_at_end": 1}), {})
    with pytest.raises(ConfigError, match="in_proj has 584 outputs"):
        load(config(pattern | odd), {})


WITHOUT_MAMBA = {"hybrid_layer_pattern": "*E-", "mtp_hybrid_layer_pattern": "M", "mtp_num_layers": 0}


@pytest.mark.parametrize(
    "sizes", [{"tensor_model_parallel_size": 4}, {"context_parallel_size": 3}], ids=["tp", "cp"]
)
def test_the_heads_of_mamba_matter_to_models_with_such_layers_alone(sizes: dict[str, int]):
    """8 heads in 2 groups; neither is divided where no layer has them."""
    load(config(WITHOUT_MAMBA, parallel=sizes, seq_length=48), {})
    with pytest.raises(ConfigError, match=r"^model.mamba_num_"):
        load(config(WITHOUT_MAMBA | {"mtp_num_layers": 1}, parallel=sizes, seq_length=48), {})


@pytest.mark.parametrize(
    ("sizes", "key"),
    [
        ({"expert_model_parallel_size": 3}, "num_moe_experts 8"),
        ({"expert_tensor_parallel_size": 3}, "moe_ffn_hidden_size 128"),
    ],
)
def test_the_experts_matter_to_models_with_such_layers_alone(sizes: dict[str, int], key: str):
    model: dict[str, Any] = {"hybrid_layer_pattern": "M*", "mtp_num_layers": 0}
    run: dict[str, Any] = {"parallel": {"data_parallel_size": 3} | sizes, "global_batch_size": 12}
    load(config(model, **run), {})
    with pytest.raises(ConfigError, match=f"^model.{key} is not divisible by"):
        load(config(model | {"hybrid_layer_pattern": "ME"}, **run), {})


@pytest.mark.parametrize(
    ("key", "model"),
    [
        ("ffn_hidden_size", {"hybrid_layer_pattern": "*-"}),
        ("moe_shared_expert_intermediate_size", {"hybrid_layer_pattern": "*E"}),
        ("hidden_size", {"mtp_num_layers": 1}),
    ],
)
def test_widths_that_processes_share_are_divided(key: str, model: dict[str, Any]):
    """megatron-core said so in a traceback of the job. Where nothing has such a width, it may be any."""
    values = config(model | {key: 255}, parallel={"tensor_model_parallel_size": 2})
    with pytest.raises(ConfigError) as refused:
        load(values, {})
    assert str(refused.value) == (
        f"model.{key} 255 is not divisible by pretrain.parallel.tensor_model_parallel_size 2"
    )
    values["model"] |= {"hybrid_layer_pattern": "*", "mtp_num_layers": 0}
    load(values, {})


def test_a_training_has_as_many_rows_of_the_vocabulary_in_every_layout():
    """Its loss has those that fill it up, too: with 7, 300 tokens have 301 rows, and 308 in two processes."""
    values: dict[str, Any] = config({"make_vocab_size_divisible_by": 7}) | {"tokenizer": {"vocab_size": 300}}
    two = {"parallel": {"tensor_model_parallel_size": 2}}
    with pytest.raises(ConfigError) as refused:
        load(values | {"sft": two}, {})
    assert str(refused.value) == (
        "model.make_vocab_size_divisible_by 7 gives 300 tokens 301 rows, which "
        "sft.parallel.tensor_model_parallel_size 2 does not divide, and with more rows the loss would be "
        "another one; give 14"
    )
    load(values | {"sft": two, "tokenizer": {"vocab_size": 302}}, {})  # 308 rows in either
    load(values | {"eval": two}, {})  # leaves them out
