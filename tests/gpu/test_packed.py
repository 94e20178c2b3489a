"""Nothing of one conversation reaches another one in its pack."""

from __future__ import annotations

import snaketron.model  # noqa: F401  before megatron
from snaketron.config import Model, Parallel
from snaketron.data.chats.packs import Pack
from snaketron.model import spec
from snaketron.train.sft_batches import collate_pack
from tests.unit.sizes.models import SMALL

import numpy as np
import pytest
import torch
from megatron.core.transformer.module import Float16Module

pytestmark = pytest.mark.usefixtures("one_process")
# The kernels see other shapes, and choose other sums.
TOLERANCE = {"fp32": 5e-3, "bf16": 5e-2}


@pytest.mark.parametrize("precision", TOLERANCE)
def test_logits_of_a_conversation_in_a_pack_are_those_of_it_alone(precision):
    torch.manual_seed(0)
    model = Model(**(SMALL | {"precision": precision, "mtp_num_layers": 0}))
    config = spec.transformer_config(model, Parallel())
    built = spec.build_model(config, model, Parallel(), 512, 256).cuda()
    module = Float16Module(config, built) if precision == "bf16" else built
    module.eval()
    lengths, rng = [37, 64, 90], np.random.default_rng(0)
    ids = rng.integers(0, 500, sum(lengths))
    starts = np.cumsum([0, *lengths[:-1]])

    def logits(tokens, starts, size):
        pack = Pack(tokens.astype(np.int32), np.ones(len(tokens), np.uint8), np.asarray(starts, np.int32))
        batch = collate_pack(pack, size, weights=np.ones((1, len(tokens)), np.float32))
        for key in ("labels", "loss_mask", "report"):
            del batch[key]
        with torch.no_grad():
            return module(attention_mask=None, **batch)[0, : len(tokens)].float()

    together = logits(ids, starts, 256)
    for start, length in zip(starts, lengths, strict=True):
        alone = logits(ids[start : start + length], [0], length)
        inside = together[start : start + length]
        error = float((inside - alone).norm() / alone.norm())
        print(precision, length, f"{error:.1e}")
        assert error < TOLERANCE[precision]
    changed = ids.copy()
    changed[:37] = (changed[:37] + 1) % 500  # another first conversation
    other = logits(changed, starts, 256)
    for last in (37 + 3, 191):  # what its convolution would reach, and all that follows
        after, before = other[37:last], together[37:last]
        error = float((after - before).norm() / before.norm())
        print(precision, f"another conversation before: {error:.1e}")
        # Not the same bits: experts with other numbers of tokens are other products.
        assert error < TOLERANCE[precision]
