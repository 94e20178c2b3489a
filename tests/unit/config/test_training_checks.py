"""What does not fit in one training is refused in the dry-run: how tokens reach their experts."""

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
