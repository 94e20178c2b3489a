"""A model is built, evaluated and saved without an optimizer; a training adds one."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import snaketron.model  # noqa: F401  before megatron
from snaketron.model.build import BuiltModel, build_model
from snaketron.model.checkpoint import Saver
from snaketron.train.build import build_training, with_optimizer
from snaketron.train.evaluate import evaluate
from snaketron.train.loop import Trainer
from tests.unit.train.test_checkpoint import Random

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer


def alive(kind: type) -> int:
    """Objects of a kind in this process."""
    gc.collect()
    return sum(isinstance(thing, kind) for thing in gc.get_objects())


def loss(built: BuiltModel) -> float:
    return evaluate(built, Random(2), "train")["train_loss"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_is_evaluated_without_an_optimizer(settings, precision: str):
    """No wrapper, no optimizer and no buffer of gradients is made; the loss is about log(256)."""
    before = alive(MegatronOptimizer), alive(DistributedDataParallel)
    built = build_model(*settings(model={"precision": precision}), 256)
    assert loss(built) == pytest.approx(5.545, abs=0.05)
    assert (alive(MegatronOptimizer), alive(DistributedDataParallel)) == before
    assert built.config.finalize_model_grads_func is None and built.config.grad_scale_func is None
    for parameter in built.model.parameters():
        assert parameter.grad is None and not hasattr(parameter, "main_grad")


def test_each_micro_batch_of_a_validation_is_a_sign_of_life(settings):
    """The supervisor takes a training without one for hanging, and a validation may be long."""
    values, run = settings(eval_samples=8)
    signs: list[int] = []
    evaluate(replace(build_model(values, run, 256), alive=lambda: signs.append(0)), Random(2), "train")
    assert len(signs) == 4


def test_the_optimizer_changes_no_weight_and_no_loss(settings):
    built = build_model(*settings(), 256)
    weights, before = [p.detach().clone() for p in built.model.parameters()], loss(built)
    training = with_optimizer(built)
    assert training.built is built and training.parallel_model.module is built.module
    assert all(torch.equal(a, b) for a, b in zip(weights, built.model.parameters(), strict=True))
    assert loss(built) == before
    assert all(hasattr(parameter, "main_grad") for parameter in built.model.parameters())


def test_a_model_without_an_optimizer_takes_what_a_training_saved(settings, tmp_path: Path):
    """The losses are the same; there is no progress where nothing was saved."""
    trainer = Trainer(build_training(*settings(), 256))
    for _ in range(2):
        trainer._step(Random(2))
    trainer.save(tmp_path)
    trainer.saver.finish()
    built = build_model(*settings(seed=7), 256)
    assert built.load_trained(tmp_path / "empty") is None and loss(built) != loss(trainer.built)
    progress = built.load_trained(tmp_path)
    assert progress is not None and progress["iteration"] == 2
    assert loss(built) == loss(trainer.built)


def test_a_model_without_an_optimizer_is_a_base_when_it_is_saved(settings, tmp_path: Path):
    run = settings()[1]
    first = build_model(*settings(seed=3), 256)
    saver = Saver.configured(run)
    saver.save(tmp_path, 1, first.base, None, {"iteration": 1})
    saver.finish()
    second = build_model(*settings(), 256)
    second.load_base(tmp_path)
    assert loss(second) == loss(first)


def test_evaluating_leaves_a_model_as_it_was(settings):
    built = build_model(*settings(), 256)
    with built.evaluating():
        assert not built.model.training and not torch.is_grad_enabled()
    assert built.model.training and torch.is_grad_enabled()


def test_five_steps_are_those_of_adamw_by_hand(settings):
    """From the gradients of the steps, in double precision; all but vectors have weight decay.

    Steps of 64 tokens: two of warm-up, and the last one is half-way through the decay. The whole gradient is
    clipped (arXiv 1711.05101, algorithm 2, and 1211.5063, algorithm 1).
    """
    rates = [0.0, 0.01, 0.02, 0.02, 0.002 + 0.018 * (1 - 0.5**0.5)]
    keys = {"learning_rate": 0.02, "min_learning_rate": 0.002, "weight_decay": 0.3, "adam_eps": 1e-6}
    keys |= {"adam_beta1": 0.8, "adam_beta2": 0.9, "clip_grad": 0.5}
    trainer = Trainer(build_training(*settings(optimizer=keys, warmup_tokens=128, decay_tokens=128), 256))
    parameters = dict(trainer.model.named_parameters())
    gradients: dict[str, torch.Tensor] = {}
    step = trainer.optimizer.step

    def watched() -> Any:
        gradients.update({name: p.main_grad.double() for name, p in parameters.items()})
        return step()

    trainer.optimizer.step = watched
    by_hand = {name: p.detach().double() for name, p in parameters.items()}
    first, second = ({name: torch.zeros_like(w) for name, w in by_hand.items()} for _ in range(2))
    for number, rate in enumerate(rates, start=1):
        norm = trainer._step(Random(2))
        whole = float(torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt())
        assert norm == pytest.approx(whole, rel=1e-5) and whole > 0.5
        for name, weight in by_hand.items():
            gradient = gradients[name] * 0.5 / whole
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.9 * second[name] + 0.1 * gradient.square()
            step_of_adam = first[name] / (1 - 0.8**number)
            step_of_adam /= (second[name] / (1 - 0.9**number)).sqrt() + 1e-6
            decay = 0.3 * weight if weight.dim() > 1 else 0.0
            by_hand[name] = weight - rate * (step_of_adam + decay)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach().double(), by_hand[name], atol=1e-5, rtol=0, msg=name)
