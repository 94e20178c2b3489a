"""A conversation inside a pack is computed as if it were alone."""

from snaketron.model.megatron.packed import partition, shift

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

LENGTHS = (70, 129, 57)


def packed(lengths):
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        total_tokens=int(ends[-1]),
    )


def forward(model, ids, lengths, **arguments):
    """All sequences in one pack, or one alone (a single length)."""
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    params = packed(lengths) if len(lengths) > 1 else None
    return model(ids, positions, None, packed_seq_params=params, **arguments)


@torch.no_grad()
def test_logits_of_a_conversation_do_not_depend_on_its_pack(build):
    model = build(init_method_std=0.3)  # large weights, so that a leak shows
    ids = torch.randint(0, 256, (1, sum(LENGTHS)))
    together = forward(model, ids, LENGTHS).split(LENGTHS, 1)
    leaking = forward(model, ids, (sum(LENGTHS),)).split(LENGTHS, 1)
    alone = [forward(model, part, (n,)) for part, n in zip(ids.split(LENGTHS, 1), LENGTHS, strict=True)]
    torch.testing.assert_close(together, tuple(alone), atol=1e-4, rtol=1e-4)
    assert all((a - b).abs().max() > 0.01 for a, b in zip(leaking[1:], alone[1:], strict=True))


@pytest.mark.parametrize("depth", [0, 1])
def test_losses_of_a_conversation_do_not_depend_on_its_pack(build, depth):
    model = build()
    ids = torch.randint(0, 256, (1, sum(LENGTHS)))
    labels = torch.cat([part.roll(-1, 1) for part in ids.split(LENGTHS, 1)], 1)
    # The last token of a conversation has nothing to predict.
    mask = torch.cat([torch.tensor([[1.0] * (n - 1) + [0.0]]) for n in LENGTHS], 1)

    def losses(ids, labels, mask, lengths):
        MTPLossLoggingHelper.tracker.clear()
        loss = forward(model, ids, lengths, labels=labels, loss_mask=mask.clone())
        return loss.detach() * mask, MTPLossLoggingHelper.tracker["loss_values"][depth].clone()

    loss, mtp = losses(ids, labels, mask, LENGTHS)
    parts = zip(*(t.split(LENGTHS, 1) for t in (ids, labels, mask)), LENGTHS, strict=True)
    alone = [losses(*part, (n,)) for *part, n in parts]
    torch.testing.assert_close(loss, torch.cat([main for main, _ in alone], 1), atol=1e-5, rtol=1e-5)
    # The logged loss is a mean, and each depth predicts one token further: one target less a conversation.
    targets = torch.tensor([n - 2.0 - depth for n in LENGTHS])
    expected = (torch.stack([value for _, value in alone]) * targets).sum() / targets.sum()
    torch.testing.assert_close(mtp, expected, atol=1e-5, rtol=1e-5)


def test_a_shift_stays_inside_a_conversation():
    """Multi-token prediction shifts ids, positions and labels in this way."""
    params = packed((3, 1, 2))
    shifted, total = shift(torch.tensor([[1, 2, 3, 4, 5, 6]]), -1, -1, params)
    assert shifted.tolist() == [[2, 3, 0, 0, 6, 0]] and int(total) == 11
    with pytest.raises(ValueError, match="only one to the left"):
        shift(torch.zeros(1, 6), 1, -1, params)


def test_context_parallel_ranks_hold_the_first_and_the_last_chunks_of_each_conversation():
    """8 tokens in 4 chunks, and 12 in 4: rank 0 has chunks 0 and 3, rank 1 those between."""
    ends = torch.tensor([0, 8, 20])
    parts = [partition(ends, 20, 2, rank).tolist() for rank in (0, 1)]
    assert parts == [[0, 1, 6, 7, 8, 9, 10, 17, 18, 19], [2, 3, 4, 5, 11, 12, 13, 14, 15, 16]]
