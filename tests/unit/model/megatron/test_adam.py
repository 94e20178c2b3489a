"""Our step of the optimizer against megatron-core's: the same weights, bit by bit."""

from __future__ import annotations

import snaketron.model  # noqa: F401  before megatron
from snaketron.config import load
from snaketron.model.megatron import adam, originals
from snaketron.model.megatron.originals import original
from snaketron.settings.training import run_settings, train_settings
from snaketron.train import loop
from snaketron.train.build import build_training
from tests.gpu.worker import BATCH, LENGTH, VOCABULARY, FixedBatches, state_hash
from tests.unit.sizes.models import SMALL

import pytest
import torch


def trained(precision: str, clip_grad: float = 1e9, spoil: bool = False) -> tuple[loop.Trainer, list[float]]:
    """A trainer after three steps, and the norms of their gradients."""
    phase = {"name": "one", "tokens": 100 * BATCH * LENGTH, "blend": [{"corpus": "docs", "weight": 1}]}
    pretrain = {"seq_length": LENGTH, "global_batch_size": BATCH, "micro_batch_size": 2, "phases": [phase]}
    pretrain |= {"warmup_tokens": 0, "decay_tokens": 64, "cpus_per_task": 1}
    pretrain |= {"optimizer": {"learning_rate": 1e-3, "min_learning_rate": 1e-4, "clip_grad": clip_grad}}
    config = load({"model": SMALL | {"precision": precision}, "pretrain": pretrain}, {})
    run = run_settings(config, "pretrain/one")
    torch.manual_seed(0)
    settings = train_settings(config, "pretrain/one")
    trainer = loop.Trainer(build_training(settings, run, VOCABULARY))
    batches = FixedBatches(2, settings.model.mtp_num_layers, LENGTH)
    if spoil:
        next(trainer.model.parameters()).data[5] = torch.inf
    return trainer, [trainer._step(batches) for _ in range(3)]


def compare(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """The two steps; without clipping, as the norms may differ in their last bit."""
    names = (adam.COPY_GRADIENTS, adam.COPY_WEIGHTS, adam.GRADIENT_NORM)
    theirs = [original(name) for name in names]
    ours = [adam._give_gradients, adam._give_weights, adam._gradient_norm]
    # On a machine without a GPU the table replaces none of them.
    monkeypatch.setattr(originals, "_originals", originals._originals | dict(zip(names, theirs, strict=True)))
    results = []
    for pieces in (theirs, ours):
        for name, piece in zip(names, pieces, strict=True):
            monkeypatch.setattr(*originals.owner_of(name), piece)
        results.append(trained(precision))
    (their_trainer, their_norms), (our_trainer, our_norms) = results
    assert all(part.__dict__["_gradients"] for part in our_trainer.optimizer.chained_optimizers)
    assert state_hash(our_trainer) == state_hash(their_trainer)
    assert our_norms == pytest.approx(their_norms, rel=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_step_is_that_of_megatron_core(monkeypatch, precision):
    compare(monkeypatch, precision)


def test_a_gradient_that_is_not_finite_ends_the_training():
    with pytest.raises(RuntimeError, match="one: the gradient of step 1 is not finite"):
        trained("fp32", clip_grad=1.0, spoil=True)


def test_adam_goes_through_each_tensor_in_blocks():
    """10,000 numbers from byte 1600 on, and 3 from byte 32 on."""
    [*whole, last, small] = adam.blocks(
        [(1600, 160_000, 320_000, 480_000, 640_000, 10_000), (32, 64, 96, 128, 160, 3)], 4096
    ).tolist()
    assert [row[0] for row in whole] == [1600, 1600 + 2 * 4096]
    assert [row[-1] for row in whole] == [4096, 4096]
    assert last == [n + 4 * 4096 for n in (1600, 160_000, 320_000, 480_000, 640_000)] + [1808]
    assert small == [32, 64, 96, 128, 160, 3]


def test_adam_takes_smaller_blocks_where_a_tensor_begins_at_no_multiple_of_16_bytes():
    table = adam.blocks([(1602, 1600, 3200, 4800, 6400, 4096)], 4096)
    assert table[:, -1].tolist() == [2048] * 2


def test_no_tensors_make_an_empty_table():
    assert len(adam.blocks([], 4096)) == 0
