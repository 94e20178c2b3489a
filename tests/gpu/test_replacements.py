"""Whether megatron-core still needs the replacements that only a GPU can judge; see the unit test."""

from __future__ import annotations

from typing import Any

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
    labels = torch.zeros(8, 1, dtype=torch.int64, device="cuda")

    def unchanged(function: Any) -> bool:
        """Whether the logits are the same after the backward pass."""
        logits = torch.randn(8, 1, 64, device="cuda", requires_grad=True)
        before = logits.detach().clone()
        function(logits, labels, group, False).sum().backward()
        return torch.equal(logits.detach(), before)

    assert unchanged(originals.original(name)), "this row of `replacements.TABLE` can go"
    assert not unchanged(originals.current(name))
