"""The optimizer on a GPU: its step against megatron-core's, and what its checkpoints take of the memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import snaketron.model  # noqa: F401  before megatron
from snaketron.train import loop
from snaketron.train.build import build_training
from tests.gpu.test_training import BF16_STATE, DETERMINISTIC
from tests.gpu.worker import VOCABULARY, fixed
from tests.unit.model.megatron.test_adam import compare

import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_step_is_that_of_megatron_core(monkeypatch, precision):
    for name, value in DETERMINISTIC.items():
        monkeypatch.setenv(name, value)
    compare(monkeypatch, precision)


def state(trainer: loop.Trainer) -> list[torch.Tensor]:
    """Weights, and the moments and main weights as the optimizer keeps them."""
    parts = [part.optimizer for part in trainer.optimizer.chained_optimizers]
    kept = [
        value
        for part in parts
        for group in part.param_groups
        for p in group["params"]
        for name, value in sorted(part.state[p].items())
        if name != "step" and isinstance(value, torch.Tensor)
    ]
    return [tensor.detach().clone() for tensor in (*trainer.model.parameters(), *kept)]


@pytest.mark.parametrize(
    ("keys", "grown"),
    [
        ({"optimizer": BF16_STATE}, 1.5),
        ({}, 1.5),
        ({"offload_optimizer": 0.5}, 8),  # half of the state goes to the GPU beside the old one
    ],
    ids=["bf16", "fp32", "offloaded"],
)
def test_a_checkpoint_is_that_of_its_step_and_takes_hardly_any_memory_of_the_gpu(
    tmp_path: Path, keys: dict[str, Any], grown: float
):
    """Moments in bf16 were copied to fp32 all at once, 8 bytes a parameter, to be saved and to be loaded."""
    model = {"precision": "bf16", "hidden_size": 1024, "moe_latent_size": None, "num_moe_experts": 16}
    settings, run, make_batches = fixed(
        model | {"moe_ffn_hidden_size": 512}, keys | {"save_in_background": True}, {}
    )
    batches = make_batches()
    one = loop.Trainer(build_training(settings, run, VOCABULARY))
    parameters = sum(p.numel() for p in one.model.parameters())
    assert parameters > 40e6
    one._step(batches)
    one.saver.prepare(one.optimizer)
    for _ in range(2):  # the second has the memory of the first
        saved = state(one)
        assert_grows_by_less(grown * parameters, lambda: one.save(tmp_path))
        for _ in range(2):  # beside the process that writes
            one._step(batches)
        one.saver.finish()
    two = loop.Trainer(build_training(settings, run, VOCABULARY))
    two._step(batches)  # so that the state is there
    assert_grows_by_less(grown * parameters, lambda: two.resume(tmp_path))
    assert two.iteration == 3
    loaded = state(two)
    assert len(loaded) == len(saved) > 100
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(loaded, saved, strict=True))


def assert_grows_by_less(count: float, function: Callable[[], object]) -> None:
    """By less than so many bytes, beside the pieces of 16 MB that are copied."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    assert torch.cuda.max_memory_allocated() - before < count + 150e6
