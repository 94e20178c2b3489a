"""Our step of the optimizer against megatron-core's: the same weights, bit by bit."""

import snaketron.model  # noqa: F401  before megatron
from snaketron.model import adam
from snaketron.train import loop
from tests.gpu.worker import FixedBatches, state_hash

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer


def trained(settings, precision: str, spoil: bool = False):
    """A trainer after three steps, whose gradients are not clipped, and the norms of its gradients."""
    optimizer = {"learning_rate": 1e-3, "min_learning_rate": 1e-4, "clip_grad": 1e9}
    what, run = settings(model={"precision": precision}, optimizer=optimizer)
    torch.manual_seed(0)
    trainer, batches = loop.Trainer(what, run, 300), FixedBatches(2)
    if spoil:
        next(trainer.model.parameters()).data[5] = torch.inf
    return trainer, [trainer._step(batches) for _ in range(3)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_step_is_that_of_megatron_core(settings, monkeypatch, precision):
    results = []
    for gradients, weights, norm in (
        (adam._copy_gradients, adam._copy_weights, adam._their_norm),
        (adam._give_gradients, adam._give_weights, adam._gradient_norm),
    ):
        monkeypatch.setattr(DistributedOptimizer, "_copy_model_grads_to_main_grads", gradients)
        monkeypatch.setattr(DistributedOptimizer, "_copy_main_params_to_model_params", weights)
        monkeypatch.setattr(ChainedOptimizer, "get_grad_norm", norm)
        results.append(trained(settings, precision))
    (theirs, their_norms), (ours, our_norms) = results
    assert all(part.__dict__["_gradients"] for part in ours.optimizer.chained_optimizers)
    assert state_hash(ours) == state_hash(theirs)
    assert our_norms == pytest.approx(their_norms, rel=1e-6)


def test_a_gradient_that_is_not_finite_ends_the_training(settings):
    with pytest.raises(RuntimeError, match="one: the gradient of step 1 is not finite"):
        trained(settings, "fp32", spoil=True)
