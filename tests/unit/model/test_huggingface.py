"""Exports against an independent implementation: transformers' NemotronH gives the same logits."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import snaketron.model  # noqa: F401  before megatron
from snaketron.config import Adapters, Model
from snaketron.huggingface.save import Checkpoint, export
from snaketron.lineage.record import Entry
from snaketron.model import lora
from snaketron.model.checkpoint import Saver

import pytest
import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor

VOCABULARY = 200  # tokens; Megatron's tensors have 256 rows
LENGTH = 40  # of a text; longer ones are compared once


@pytest.fixture
def save(tmp_path: Path):
    """save(model, keys) exports a model through a checkpoint of its own, and returns the directory."""

    def make(model: HybridModel, keys: dict, name: str = "export", **options: int) -> Path:
        Saver(keep=1, background=False).save(tmp_path / f"{name}_ckpt", 1, model, None, {"iteration": 1})
        checkpoint = Checkpoint(
            tensors=tmp_path / f"{name}_ckpt/iter_0000001",
            tokenizer=tmp_path,
            model=Model(**keys),
            seq_length=64,
            vocab_size=VOCABULARY,
            eos_token_ids=[0],
            pad_token_id=1,
        )
        source = Entry("checkpoint", "ckpt", version="one")
        export(checkpoint, tmp_path / name, source=source, card="", **options)
        return tmp_path / name

    return make


@torch.no_grad()
def unsettle(model: HybridModel) -> None:
    """Make everything count that is constant in new weights: norms, D, the routers' bias, padding."""
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith(".D"):
            parameter.uniform_(0.5, 1.5)
    for module in model.modules():
        if getattr(module, "expert_bias", None) is not None:
            module.expert_bias.normal_(std=0.1)  # so that it decides for some tokens


def configuration(number: int) -> dict[str, Any]:
    """Keys of `model`, drawn from the number; the pattern has each kind of layer often enough."""
    rng = Random(number)
    topk, experts = 1 + number % 4, rng.choice([4, 6, 8])
    groups, mamba_groups = rng.choice([1, 2, 4]), rng.choice([1, 2, 4])
    return {
        "hybrid_layer_pattern": "".join(rng.sample("ME*-" + "ME*" * 2, rng.randint(3, 7))),
        "hidden_size": rng.choice([32, 48, 64]),
        "ffn_hidden_size": rng.choice([40, 64]),
        "num_attention_heads": groups * rng.choice([1, 2, 3]),
        "num_query_groups": groups,
        "kv_channels": rng.choice([8, 12, 16]),
        "mamba_num_heads": mamba_groups * rng.choice([1, 2, 3]),
        "mamba_head_dim": rng.choice([8, 16]),
        "mamba_state_dim": rng.choice([8, 16, 24]),
        "mamba_num_groups": mamba_groups,
        "num_moe_experts": experts,
        "moe_router_topk": topk,
        "moe_ffn_hidden_size": rng.choice([24, 32]),
        "moe_latent_size": rng.choice([16, 24]) if number % 2 else None,
        "moe_shared_expert_intermediate_size": rng.choice([8, 40]),
        "moe_router_topk_scaling_factor": rng.choice([1.0, 2.5, 5.0]),
        "mtp_num_layers": number % 3,
        "mtp_hybrid_layer_pattern": rng.choice(["*E", "E*", "M*", "-"]),
        "layernorm_epsilon": rng.choice([1e-5, 1e-6, 1e-3]),
        "init_method_std": 0.1,
    }


def published(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"], report
    assert not report["unexpected_keys"], report  # multi-token prediction is passed over
    return model.float().eval()


def texts(count: int, length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (count, length))


@torch.no_grad()
def difference(model: HybridModel, directory: Path, ids: Tensor) -> float:
    """The largest difference of two logits, relative to the largest logit."""
    model.eval()
    here = model(ids, None, None)[..., :VOCABULARY]
    there = published(directory)(ids, use_cache=False).logits
    return float((here - there).abs().max() / there.abs().max())


@pytest.mark.parametrize("number", range(14))
def test_logits_are_those_of_transformers(build, save, number: int):
    keys = configuration(number)
    model = build(vocab_size=VOCABULARY, **keys)
    unsettle(model)
    assert difference(model, save(model, keys), texts(2, LENGTH)) < 1e-4


KEYS = configuration(5) | {"hybrid_layer_pattern": "MEM*E-", "mtp_hybrid_layer_pattern": "*E"}


def train(model: HybridModel, steps: int) -> None:
    """Large steps: afterwards many time steps of Mamba-2 are below 0.001, as after the main job."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    ids = texts(4, LENGTH + 1)
    for _ in range(steps):
        optimizer.zero_grad()
        weights = torch.ones(4, LENGTH)
        model(ids[:, :-1], None, None, labels=ids[:, 1:].contiguous(), loss_mask=weights).mean().backward()
        optimizer.step()


def test_logits_are_those_of_transformers_after_a_training(build, save):
    model = build(vocab_size=VOCABULARY, **KEYS)
    unsettle(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("dt_bias"):
                parameter -= 5.0  # softplus of -9 is 1e-4
    train(model, 10)
    assert difference(model, save(model, KEYS), texts(2, LENGTH)) < 1e-4


def test_logits_are_those_of_transformers_after_merging_adapters(build, save):
    model = build(vocab_size=VOCABULARY, **KEYS)
    unsettle(model)
    before = model.eval()(ids := texts(2, LENGTH), None, None)
    lora.add_adapters(model, Adapters(target_modules=["linear_*", "*_proj"], rank=4), 1)
    train(model.train(), 3)
    lora.merge(model)
    directory = save(lora.Part(model, adapters=False), KEYS)
    assert not torch.allclose(model.eval()(ids, None, None), before, rtol=1e-2)
    assert difference(model, directory, ids) < 1e-4


def test_logits_of_padded_batches_are_those_of_transformers(build, save):
    """Padding on the right in both, and on the left in transformers, as batches of prompts have it."""
    model = build(vocab_size=VOCABULARY, **KEYS)
    unsettle(model)
    other = published(save(model, KEYS))
    lengths, rows = (30, 17), texts(2, 30)
    with torch.no_grad():
        alone = [
            model.eval()(row[None, :n], None, None)[0, :, :VOCABULARY]
            for row, n in zip(rows, lengths, strict=True)
        ]
        right = torch.arange(30)[None] < torch.tensor(lengths)[:, None]
        here = model(rows, None, None, padding_mask=~right)[..., :VOCABULARY]
        there = other(rows, attention_mask=right.long(), use_cache=False).logits
        shifted = torch.stack([row.roll(30 - n) for row, n in zip(rows, lengths, strict=True)])
        left = other(shifted, attention_mask=right.flip(1).long(), use_cache=False).logits
    for i, n in enumerate(lengths):
        for found in (here[i, :n], there[i, :n], left[i, 30 - n :]):
            assert (found - alone[i]).abs().max() / alone[i].abs().max() < 1e-4


def test_logits_of_a_text_of_several_chunks_are_those_of_transformers(build, save):
    """The scan of both goes chunk by chunk; transformers takes 128 positions at a time."""
    model = build(vocab_size=VOCABULARY, **KEYS)
    unsettle(model)
    assert difference(model, save(model, KEYS), texts(1, 300)) < 1e-4
