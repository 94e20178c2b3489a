"""LoRA in a training: what stays as it was, what it costs, what its checkpoints hold, and merging."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import snaketron.model  # noqa: F401  before megatron
from snaketron.config import Adapters, Lora, Optimizer
from snaketron.model import lora
from snaketron.settings.training import LoraSettings
from snaketron.sizes.memory import static_memory
from snaketron.sizes.stages import adapter_parameters
from snaketron.sizes.work import Work
from snaketron.train.build import build_training
from snaketron.train.evaluate import evaluate
from snaketron.train.loop import Trainer
from tests.conftest import run_module
from tests.unit.train.lora_gradients import LAYOUTS
from tests.unit.train.test_checkpoint import Random, same, shards, state

import pytest
import torch
from megatron.core import dist_checkpointing

VOCABULARY = 256


@pytest.fixture
def trainer(settings):
    """trainer(rank=..., ..., model=...) gives a training of adapters; trainer(rank=None) a full one."""

    def make(
        rank: int | None = 4, steps: int = 0, model: dict | None = None, rate: float = 3e-3, **keys: Any
    ) -> Trainer:
        full, run = settings(model=model, optimizer={"learning_rate": rate})
        adapters = {"target_modules": ["linear_*", "*_proj"], "rank": rank} | keys
        values = LoraSettings(**full.model_dump(), lora=Adapters(**adapters)) if rank else full
        made = Trainer(build_training(values, run, VOCABULARY))
        for _ in range(steps):
            made._step(Random(2))
        return made

    return make


def frozen(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights and buffers of the base."""
    model = trainer.model
    found = {name: p for name, p in model.named_parameters() if ".lora." not in name}
    return {name: t.detach().clone() for name, t in (*found.items(), *model.named_buffers())}


def loss(trainer: Trainer) -> float:
    return evaluate(trainer.built, Random(2), "train")["train_loss"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_of_the_base_changes(trainer, precision: str):
    """Not a bit of the weights, and not the routers' bias, which full training moves at each step."""
    one = trainer(model={"precision": precision})
    before, adapters = (
        frozen(one),
        [p.detach().clone() for _, a in lora.adapted(one.model) for p in (a.a, a.b)],
    )
    for _ in range(3):
        one._step(Random(2))
    after = frozen(one)
    counts = {name for name in before if name.endswith("local_tokens_per_expert")}
    assert all(torch.equal(before[name], after[name]) for name in before if name not in counts)
    biases = [name for name in before if name.endswith("expert_bias")]
    assert len(biases) == 2 and all(after[name].abs().max() == 0 for name in biases)
    now = [p for _, a in lora.adapted(one.model) for p in (a.a, a.b)]
    assert not any(torch.equal(p, q) for p, q in zip(adapters[1::2], now[1::2], strict=True))

    full = trainer(rank=None, model={"precision": precision}, steps=3)
    assert all(b.abs().max() > 0 for n, b in full.model.named_buffers() if n.endswith("expert_bias"))


def memory(trainer: Trainer) -> dict[str, int]:
    """Bytes of weights, of DistributedDataParallel's gradient buffers, and in the optimizer."""
    ddp = trainer.parallel_model
    buffers = [*ddp.buffers, *ddp.expert_parallel_buffers]
    optimizer = 0
    for one in trainer.optimizer.chained_optimizers:
        for group in one.optimizer.param_groups:
            for p in group["params"]:
                values = one.optimizer.state[p].values()
                optimizer += sum(t.numel() * t.element_size() for t in values if torch.is_tensor(t))
                # In bf16 the parameters that it updates are copies, in fp32 the weights themselves.
                optimizer += p.numel() * p.element_size() if trainer.built.config.bf16 else 0
    return {
        "weights": sum(p.numel() * p.element_size() for p in trainer.model.parameters()),
        "gradients": sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers),
        "optimizer": optimizer,
    }


@pytest.mark.parametrize(("precision", "width", "state_bytes"), [("fp32", 4, 8), ("bf16", 2, 12)])
def test_frozen_parameters_cost_their_weights_alone(trainer, precision: str, width: int, state_bytes: int):
    """4 bytes of gradient and 8 or 12 of optimizer for each parameter of an adapter, none for the base."""
    model = {"precision": precision}
    one, full = trainer(steps=1, model=model), trainer(rank=None, steps=1, model=model)
    numbers = [p.numel() for p in one.model.parameters() if p.requires_grad]
    found, all_of_it = memory(one), memory(full)
    base = sum(p.numel() for p in full.model.parameters())
    print(f"{precision}: {base:,} + {sum(numbers):,} parameters; full {all_of_it}, LoRA {found}")
    assert found["weights"] == width * (base + sum(numbers))
    assert found["optimizer"] == state_bytes * sum(numbers)
    # Each parameter begins at a multiple of 64 elements, and a buffer's end is padded.
    assert 4 * sum(numbers) <= found["gradients"] <= 4 * (sum(numbers) + 64 * (len(numbers) + 4))
    assert all_of_it["gradients"] >= 4 * base and all_of_it["optimizer"] == state_bytes * base

    # Which is what a dry-run says.
    settings = one.settings
    assert isinstance(settings, LoraSettings)
    (added,) = adapter_parameters(settings.model, VOCABULARY, one.run.parallel, settings.lora)
    assert added.total == sum(numbers)
    lora = Lora(**settings.lora.model_dump(), parallel=one.run.parallel)
    (kept,) = static_memory(Work(settings.model, VOCABULARY, settings.seq_length, 1, lora, Optimizer()))
    assert kept.weights == found["weights"] and kept.gradients == 4 * added.total
    assert kept.main_weights + kept.moments == found["optimizer"]


def test_a_checkpoint_holds_the_adapters_alone(trainer, tmp_path: Path):
    one, full = trainer(steps=1), trainer(rank=None, steps=1)
    one.save(tmp_path / "lora")
    full.save(tmp_path / "full")
    sizes = {
        name: sum(map(len, shards(tmp_path / name / "iter_0000001").values())) for name in ("lora", "full")
    }
    trained = sum(p.numel() for p in one.model.parameters() if p.requires_grad)
    print(f"{trained:,} parameters of adapters: {sizes} bytes")
    there = dist_checkpointing.load_tensors_metadata(tmp_path / "lora/iter_0000001")
    assert all(".lora." in key for key in there)
    # Weights, main weights (kept in fp32 as well) and two moments.
    assert sum(math.prod(t.global_shape) for t in there.values()) == 4 * trained


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_training_ends_with_the_same_bits(trainer, tmp_path: Path, precision: str):
    """Dropout included: its draws are a function of the step."""
    keys: dict[str, Any] = {"model": {"precision": precision}, "dropout": 0.3}
    base = trainer(rank=None, model=keys["model"], steps=1)
    base.save(tmp_path / "base")
    whole = trainer(**keys)
    whole.start_from(tmp_path / "base", optimizer_of_base=False)
    for _ in range(4):
        whole._step(Random(2))
        if whole.iteration == 2:
            whole.save(tmp_path / "lora")
    torch.manual_seed(99)
    resumed = trainer(**keys)
    resumed.start_from(tmp_path / "base", optimizer_of_base=False)
    assert resumed.resume(tmp_path / "lora") and resumed.iteration == 2
    for _ in range(2):
        resumed._step(Random(2))
    assert same(state(resumed), state(whole))
    without = trainer(model=keys["model"])
    without.start_from(tmp_path / "base", optimizer_of_base=False)
    for _ in range(4):
        without._step(Random(2))
    assert not same(state(without), state(whole))


# In nats, of losses about 5.5. bf16 rounds W + s B A to 8 bits, and products of adapters of their own too.
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}


@pytest.mark.parametrize("precision", TOLERANCE)
def test_the_merged_checkpoint_is_a_base_with_the_same_loss(trainer, tmp_path: Path, precision: str):
    model = {"precision": precision}
    one = trainer(model=model, steps=6, rate=0.03)
    before = loss(one)
    lora.merge(one.model)
    after = loss(one)
    one.saver.save(tmp_path, 4, lora.Part(one.model, adapters=False), None, {"iteration": 4})
    full = trainer(rank=None, model=model)
    initial = loss(full)
    full.start_from(tmp_path, optimizer_of_base=False)
    print(f"{precision}: base {initial:.6f}, with adapters {before:.6f}, merged {after:.6f}")
    assert abs(before - initial) > 10 * TOLERANCE[precision]
    assert abs(after - before) < TOLERANCE[precision]
    assert loss(full) == after
    full._step(Random(2))  # it trains on


@pytest.mark.parametrize("recompute", [["layer"], ["moe"]])
def test_recomputed_layers_give_the_same_adapters(settings, recompute: list[str]):
    """Although nothing that goes into the first layer wants a gradient by itself."""
    results = []
    for modules in ([], recompute):
        full, run = settings(recompute=modules)
        values = LoraSettings(**full.model_dump(), lora=Adapters(rank=4, dropout=0.2))
        made = Trainer(build_training(values, run, VOCABULARY))
        for _ in range(2):
            made._step(Random(2))
        results.append(state(made))
    assert same(*results)


def test_gradients_in_parts_are_those_of_one_process(tmp_path: Path):
    """Every factor's gradient agrees under tensor, expert and pipeline parallelism, up to rounding."""
    program, whole = "tests.unit.train.lora_gradients", str(tmp_path / "whole.pt")
    run_module(program, whole)
    errors = json.loads(run_module(program, whole, processes=2).output.splitlines()[-1])
    for layout in LAYOUTS:
        found = errors[layout]
        worst = max(found, key=found.__getitem__)
        print(f"{layout}: {len(found)} factors, largest error {found[worst]:.1e} of {worst}")
        assert found[worst] < 1e-5
        assert len(found) == len(torch.load(whole))
