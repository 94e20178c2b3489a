"""Exports against an independent implementation: transformers' NemotronH gives the same logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import snaketron.model  # noqa: F401  before megatron
from snaketron.config import Adapters, Model, Optimizer
from snaketron.huggingface import torch_dist
from snaketron.huggingface.adapters import export_adapters
from snaketron.huggingface.load import published_weights
from snaketron.huggingface.peft import refused
from snaketron.huggingface.save import Checkpoint, export
from snaketron.inference.generate import generate
from snaketron.lineage.record import Entry
from snaketron.log import UserError
from snaketron.model import lora
from snaketron.model.build import BuiltModel
from snaketron.model.checkpoint import Saver, load
from snaketron.settings.training import RunSettings, Schedule, TrainSettings

import pytest
import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from torch import Tensor

VOCABULARY = 200  # tokens; Megatron's tensors have 256 rows
LENGTH = 40  # of a text; longer ones are compared once


def saved(directory: Path, model: HybridModel | lora.Part, keys: dict, tokenizer: Path) -> Checkpoint:
    """A model, or its adapters, in a checkpoint of its own."""
    Saver.configured(RunSettings(tracking="off")).save(directory, 1, model, None, {"iteration": 1})
    return Checkpoint(
        tensors=directory / "iter_0000001",
        tokenizer=tokenizer,
        model=Model(**keys),
        seq_length=64,
        vocab_size=VOCABULARY,
        eos_token_ids=[0],
        pad_token_id=1,
    )


SOURCE = Entry("checkpoint", "ckpt", version="one")


@pytest.fixture
def save(tmp_path: Path):
    """save(model, keys) exports a model through a checkpoint of its own, and returns the directory."""

    def make(model: HybridModel | lora.Part, keys: dict, name: str = "export") -> Path:
        checkpoint = saved(tmp_path / f"{name}_ckpt", model, keys, tmp_path)
        export(checkpoint, tmp_path / name, source=SOURCE, card="")
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


def test_what_transformers_saves_is_imported(build, save, tmp_path: Path):
    """A model that was tuned there lost its multi-token prediction, and lists its layers by kind."""
    there = published(save(build(vocab_size=VOCABULARY, **KEYS), KEYS))
    with torch.no_grad():
        for parameter in there.parameters():
            parameter.add_(torch.randn_like(parameter) / 50)
    there.save_pretrained(tmp_path / "tuned", max_shard_size="40KB")
    keys = KEYS | {"mtp_num_layers": 0}
    weights = published_weights(tmp_path / "tuned", Model(**keys), VOCABULARY)
    (tmp_path / "base/iter_0000001").mkdir(parents=True)
    torch_dist.write(tmp_path / "base/iter_0000001", weights.chunks, {"iteration": 1})
    model = build(vocab_size=VOCABULARY, **keys)
    load(tmp_path / "base", 1, model, None)
    assert difference(model, tmp_path / "tuned", texts(2, LENGTH)) < 1e-4


# ------------------------------------------------------------------------------------- generation


def answers(model: HybridModel, keys: dict, prompts: Tensor, count: int) -> list[list[int]]:
    """What Snaketron's decoder generates greedily after prompts of one length."""
    settings = TrainSettings(
        stage="sft",
        seed=0,
        model=Model(**keys),
        optimizer=Optimizer(),
        seq_length=prompts.shape[1] + count,
        global_batch_size=1,
        train_iters=0,
        schedule=Schedule(style="constant", start=0, warmup=0, end=1, decay=0, increment=1),
    )
    run = RunSettings(tracking="off")
    built = BuiltModel(
        settings=settings, run=run, vocab_size=VOCABULARY, config=model.config, model=model, module=model
    )
    return generate(built, prompts.tolist(), stop=[], max_tokens=count)


# transformers has no cache for a model without attention, such as those of 3 and 8.
@pytest.mark.parametrize("number", [2, 5, 11, 12])
def test_greedy_answers_of_64_tokens_are_those_of_transformers(build, save, number: int):
    """Two prompts of 9 tokens: no token after them differs, so no state of either decoder is off."""
    keys = configuration(number)
    model = build(vocab_size=VOCABULARY, **keys)
    unsettle(model)
    prompts = texts(2, 9)
    there = published(save(model, keys)).generate(
        prompts,
        attention_mask=torch.ones_like(prompts),  # else the padding token is masked
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=-1,
    )
    here = answers(model, keys, prompts, 64)
    assert here == there[:, 9:].tolist()
    assert len(set(here[0])) > 3  # it does not say one word all the time


# --------------------------------------------------------------------------------------- adapters

ALL = ["linear_qkv", "linear_proj", "in_proj", "linear_fc1", "linear_fc2", "fc1_latent_proj", "router"]


@pytest.mark.parametrize(
    ("targets", "expert_rank"),
    [(ALL, 2), (["decoder.*.experts.linear_fc2"], None)],
    ids=["all", "experts"],
)
def test_peft_gives_the_logits_of_the_adapters_on_the_exported_base(
    build, save, tmp_path: Path, targets: list[str], expert_rank: int | None
):
    """The model has a latent space and a block of multi-token prediction, whose adapters are left out."""
    from peft import PeftModel

    keys = KEYS | {"hybrid_layer_pattern": "MEM*E-", "moe_latent_size": 16}
    model = build(vocab_size=VOCABULARY, **keys)
    unsettle(model)
    base = save(model, keys)
    adapters = Adapters(target_modules=targets, rank=4, expert_rank=expert_rank, alpha=6)
    lora.add_adapters(model, adapters, 1)
    train(model, 3)
    checkpoint = saved(tmp_path / "lora_ckpt", lora.Part(model, adapters=True), keys, tmp_path)
    record = export_adapters(checkpoint, adapters, tmp_path / "hf", base=str(base), source=SOURCE)
    assert (record.counts["left_out_of_multi_token_prediction"] > 0) == (targets is ALL)
    plain = published(base)
    ids = texts(2, LENGTH)
    with torch.no_grad():
        here = model.eval()(ids, None, None)[..., :VOCABULARY]
        before = plain(ids, use_cache=False).logits
        there = PeftModel.from_pretrained(plain, tmp_path / "hf").eval()(ids, use_cache=False).logits
    scale = there.abs().max()
    assert (here - there).abs().max() / scale < 1e-4
    assert (before - there).abs().max() / scale > 1e-2


def test_adapters_say_where_their_answers_end(build, tmp_path: Path):
    """The exported base of a tuning knows the end of a text alone, and PEFT has nothing for it."""
    from transformers import GenerationConfig

    model = build(vocab_size=VOCABULARY, **KEYS)
    adapters = Adapters(target_modules=["linear_qkv"], rank=2)
    lora.add_adapters(model, adapters, 1)
    checkpoint = saved(tmp_path / "ckpt", lora.Part(model, adapters=True), KEYS, tmp_path)
    checkpoint = replace(checkpoint, eos_token_ids=[0, 3])
    record = export_adapters(checkpoint, adapters, tmp_path / "hf", base="hf/one", source=SOURCE)
    assert GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == [0, 3]
    assert "generation_config.json" in {entry.name for entry in record.outputs}


def test_adapters_that_peft_refuses_are_refused_with_the_way_out(build, tmp_path: Path):
    keys = KEYS
    model = build(vocab_size=VOCABULARY, **keys)
    for target, reason in (("out_proj", "out_proj of Mamba-2"), ("mtp.*.linear_fc1", "multi-token")):
        adapters = Adapters(target_modules=[target])
        lines = refused(adapters, Model(**keys))
        assert reason in lines[0] and lines[1].startswith("take hf/lora_merged")
        checkpoint = saved(tmp_path / reason[:5], model, keys, tmp_path)
        with pytest.raises(UserError, match="hf/lora_merged"):
            export_adapters(checkpoint, adapters, tmp_path / "hf", base="hf/one", source=SOURCE)
    assert not (tmp_path / "hf").exists()
    assert refused(Adapters(target_modules=ALL), Model(**keys)) == []
    refusal = refused(Adapters(target_modules=["in_proj", "out_proj", "router"]), Model(**keys))
    assert refusal[1].endswith("train other targets, such as [in_proj, router]")


def test_adapters_that_are_missing_or_not_targeted_are_named_at_once(build, tmp_path: Path):
    model = build(vocab_size=VOCABULARY, **KEYS)
    lora.add_adapters(model, Adapters(target_modules=["linear_proj", "router"], rank=4), 1)
    checkpoint = saved(tmp_path / "ckpt", lora.Part(model, adapters=True), KEYS, tmp_path)
    other = Adapters(target_modules=["decoder.*.linear_proj", "decoder.*.linear_qkv"], rank=8)
    with pytest.raises(UserError) as refused_:
        export_adapters(checkpoint, other, tmp_path / "hf", base="hf/one", source=SOURCE)
    text = str(refused_.value)
    for line in (
        "decoder.layers.3.self_attention.linear_qkv.lora.a: missing",
        "decoder.layers.3.self_attention.linear_proj.lora.a: [4, ",
        "decoder.layers.1.mlp.router.lora.a: not of this model",
    ):
        assert line in text
    assert not (tmp_path / "hf").exists()
