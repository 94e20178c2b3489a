"""What stands in for a GPU and for Transformer Engine's optimizer, against torch."""

import subprocess
import sys

import snaketron.model  # noqa: F401  before megatron
from snaketron.model import backend

import pytest
import torch

if not backend.HAS_GPU:
    from snaketron.model.megatron.cpu import FusedAdam

pytestmark = pytest.mark.skipif(backend.HAS_GPU, reason="the stand-ins are for machines without a GPU")


def test_adam_is_that_of_torch_also_when_resumed():
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    start = [torch.randn(5, 3), torch.randn(7)]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    adam, adamw = FusedAdam(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for step in range(6):
        if step == 3:
            saved, adam = adam.state_dict(), FusedAdam(ours, **settings)
            adam.load_state_dict(saved)
        for a, b in zip(ours, theirs, strict=True):
            a.grad = b.grad = torch.randn_like(a)
        adam.step()
        adamw.step()
    torch.testing.assert_close(ours, theirs)


def test_adam_of_a_group_without_parameters_does_nothing():
    """A pipeline stage may have no routed experts, which have a group of their own."""
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    adam = FusedAdam(
        [{"params": [weight]}, {"params": []}], lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
    )
    adam.step()
    assert torch.allclose(weight, torch.full((2,), 0.9))


def test_cuda_means_cpu_to_megatron_and_to_nobody_else():
    from megatron.core.optimizer import clip_grads

    assert clip_grads.torch.zeros(1, device="cuda").device.type == "cpu"
    assert torch.cuda.current_device() == "cpu"
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")


IMPORTED = """
import gc, sys, snaketron.model, torch
from snaketron.model.megatron.cpu import FusedAdam
adam = FusedAdam([torch.nn.Parameter(torch.ones(2))], lr=1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0)
adam.zero_grad(), adam.step(), adam.load_state_dict(adam.state_dict())
assert gc.isenabled() and gc.get_freeze_count() > 100_000
not_there = {"torch._dynamo", "tensorboard", "wandb", "triton.runtime", "sympy", "setuptools"}
assert not not_there & set(sys.modules), not_there & set(sys.modules)
from torch.distributed.tensor._ops import _tensor_ops
assert _tensor_ops.statically_known_true(True) and "sympy" in sys.modules
from torch.utils import cpp_extension
assert cpp_extension.BuildExtension.__name__ and "setuptools" in sys.modules
"""


def test_a_training_imports_no_compiler_and_no_tracker():
    """Each takes time in every process. What is left out is imported when it is called.

    Garbage is collected again after the import.
    """
    subprocess.run([sys.executable, "-c", IMPORTED], check=True)
