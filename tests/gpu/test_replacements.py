"""Whether megatron-core still needs the replacements that only a GPU can judge; see the unit test."""

from __future__ import annotations

import snaketron.model  # noqa: F401  before megatron
from snaketron.model.megatron import originals

import pytest
import torch

TESTED = {"the cross entropy"}

pytestmark = pytest.mark.usefixtures("one_process")


def test_the_original_cross_entropy_leaves_the_logits_as_they_are():
    """So the gradient is in other memory."""
    from megatron.core import parallel_state

    name = "megatron.core.models.common.language_module.language_module:te_parallel_cross_entropy"
    group = parallel_state.get_tensor_model_parallel_group()
    kept, overwritten = (torch.randn(8, 1, 64, device="cuda") for _ in range(2))
    before, labels = kept.clone(), torch.zeros(8, 1, dtype=torch.int64, device="cuda")
    originals.original(name)(kept.requires_grad_(), labels, group, False)
    assert torch.equal(kept.detach(), before), "this row of `replacements.TABLE` can go"
    before = overwritten.clone()
    originals.current(name)(overwritten.requires_grad_(), labels, group, False)
    assert not torch.equal(overwritten.detach(), before)
