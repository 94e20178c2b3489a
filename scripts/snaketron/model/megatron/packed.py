"""Packed sequences: shifts that stay inside a sequence, and exact losses of multi-token prediction.

- megatron-core shifts a pack in Python, sequence by sequence, with a few copies to the host for each; `shift`
  shifts all of them at once.
- megatron-core averages the loss of multi-token prediction over the tokens of each micro-batch and rank, and
  then over those. That is not the average over a step whose micro-batches have different numbers of trained
  tokens. `process_mtp_loss` takes the weight of each position from the data (`train.sft_batches`), where the
  whole step is known.
- In a tuning half of the positions count nothing. On a CPU their logits are not computed: `counted_rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from snaketron.model.megatron.originals import original

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig, multi_token_prediction
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler, MTPLossLoggingHelper
from torch import Tensor

PROCESS_MTP_LOSS = "megatron.core.models.hybrid.hybrid_model:process_mtp_loss"
LANGUAGE_MODEL_LOSS = (
    "megatron.core.models.common.language_module.language_module:LanguageModule.compute_language_model_loss"
)


def partition(ends: Tensor, total: int, ranks: int, rank: int) -> Tensor:
    """Positions of a pack that a context parallel rank holds, in its order.

    Each sequence is cut into 2 x `ranks` equal chunks; a rank has chunks `rank` and 2 x `ranks` - 1 - `rank`.

    `ends` (sequences + 1,) are the sequences' bounds, from 0 to `total`; every length is a multiple of 2 x
    `ranks`. Transformer Engine's `thd_get_partitioned_indices` gives the same positions.
    """
    lengths = ends.diff()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=ends.device), lengths)
    offset = torch.arange(total, device=ends.device) - ends[:-1].long()[sequence]
    chunk = offset // (lengths.long()[sequence] // (2 * ranks))
    return torch.nonzero((chunk == rank) | (chunk == 2 * ranks - 1 - rank)).flatten()


def shift(
    tensor: Tensor,
    shifts: int,
    dims: int,
    packed_seq_params: PackedSeqParams,
    cp_group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Each position's value of the next one in its sequence, 0 for the last; and the sum of all.

    `tensor` (..., length) holds the whole pack, or under context parallelism this rank's part of it.
    """
    if shifts != -1 or dims not in (-1, tensor.dim() - 1):
        raise ValueError(f"shifts {shifts} and dims {dims}: only one to the left in the last dimension")
    ends, ranks = packed_seq_params.cu_seqlens_q, 1 if cp_group is None else cp_group.size()
    positions: list[Tensor] = []
    if ranks > 1:
        total = tensor.shape[-1] * ranks
        positions = [partition(ends, total, ranks, rank) for rank in range(ranks)]
        parts = [torch.empty_like(tensor) for _ in range(ranks)]
        torch.distributed.all_gather(parts, tensor.contiguous(), group=cp_group)
        tensor = torch.empty(*tensor.shape[:-1], total, dtype=tensor.dtype, device=tensor.device)
        for part, where in zip(parts, positions, strict=True):
            tensor[..., where] = part
    shifted = tensor.roll(-1, -1)
    shifted.index_fill_(-1, ends[1:].long() - 1, 0)  # not `= 0`, which copies from the host
    if ranks > 1:
        assert cp_group is not None
        shifted = shifted[..., positions[cp_group.rank()]]
    return shifted, shifted.sum()


class Expected:
    """The factors (batch, length) of the next loss's gradient, by which the backward pass multiplies it.

    From the model's `loss_mask` to the kernel that computes the gradient with the loss (`loss`); all are 1 if
    None. What else the backward pass brings is right too, and takes longer.
    """

    factors: Tensor | None = None

    @classmethod
    def of_model(cls, loss_mask: Tensor | None) -> None:
        """Expect the weights of the next token, if `loss_mask` is as in `process_mtp_loss`."""
        cls.factors = None if loss_mask is None or loss_mask.dim() == 2 else loss_mask[0]

    @classmethod
    def take(cls) -> Tensor | None:
        """What is expected, (batch, length), which is forgotten by that."""
        factors, cls.factors = cls.factors, None
        return factors


class _Counted:
    """The positions whose logits the model computes, from `process_mtp_loss` to the loss of the next token.

    Both are called in one forward pass of the model.
    """

    rows: Tensor | None = None


def counted_rows(weights: Tensor, ranks: int) -> Tensor | None:
    """Positions of a pack whose `weights` (1, length) are not 0; None: all are computed.

    So it is where ranks share the output layer, and on a GPU, which would wait for the host.
    """
    if weights.device.type != "cpu" or len(weights) > 1 or ranks > 1:
        return None
    rows = weights[0].nonzero().flatten()
    return rows if 0 < len(rows) < weights.shape[1] else None


def compute_language_model_loss(self: Any, labels: Tensor, logits: Tensor) -> Tensor:
    """The loss of each position (batch, length); 0 where the logits were not computed."""
    rows, _Counted.rows = _Counted.rows, None
    if rows is None:
        return original(LANGUAGE_MODEL_LOSS)(self, labels, logits)
    losses = original(LANGUAGE_MODEL_LOSS)(self, labels[:, rows], logits)
    return losses.new_zeros(labels.shape).index_copy(1, rows, losses)


def process_mtp_loss(
    hidden_states: Tensor,
    labels: Tensor | None,
    loss_mask: Tensor | None,
    output_layer: Callable[..., tuple[Tensor, Any]],
    output_weight: Tensor | None,
    runtime_gather_output: bool | None,
    is_training: bool,
    compute_language_model_loss: Callable[[Tensor, Tensor], Tensor],
    config: TransformerConfig,
    cp_group: torch.distributed.ProcessGroup | None = None,
    tp_group: torch.distributed.ProcessGroup | None = None,
    packed_seq_params: PackedSeqParams | None = None,
    **others: Any,
) -> Tensor:
    """Add the losses of multi-token prediction to the graph; returns the hidden states of the next token.

    `loss_mask` (1 + depths, batch, length) has the weight of each position's loss for the next token and for
    each depth; with (batch, length) megatron-core's own averages are taken. The loss that is added is that of
    DeepSeek-V3 (arXiv 2412.19437, equations 24 and 25) times the weights. The tracker gets the weighted sums.
    On a CPU the states of `counted_rows` alone are returned.
    """
    if loss_mask is None or labels is None or loss_mask.dim() == 2:
        return original(PROCESS_MTP_LOSS)(
            hidden_states,
            labels,
            loss_mask,
            output_layer,
            output_weight,
            runtime_gather_output,
            is_training,
            compute_language_model_loss,
            config,
            cp_group,
            tp_group,
            packed_seq_params,
            **others,
        )
    depths, ranks = config.mtp_num_layers, 1 if tp_group is None else tp_group.size()
    share = config.mtp_loss_scaling_factor / depths
    hidden_states, *predicted = torch.chunk(hidden_states, 1 + depths, dim=0)
    for depth, (states, weights) in enumerate(zip(predicted, loss_mask[1:], strict=True)):
        labels, _ = multi_token_prediction.roll_tensor(
            labels, shifts=-1, dims=-1, cp_group=cp_group, packed_seq_params=packed_seq_params
        )
        rows = counted_rows(weights, ranks)
        logits, _ = output_layer(
            states if rows is None else states[rows],
            weight=output_weight,
            runtime_gather_output=runtime_gather_output,
        )
        _Counted.rows, Expected.factors = rows, share * weights
        loss = weights * compute_language_model_loss(labels, logits)
        if is_training:
            MTPLossLoggingHelper.save_metrics_to_tracker(
                loss.sum(), loss.new_zeros(()), loss.new_zeros(()), depth, depths
            )
        hidden_states = MTPLossAutoScaler.apply(hidden_states, share * loss)
    Expected.of_model(loss_mask)
    _Counted.rows = counted_rows(loss_mask[0], ranks)
    return hidden_states if _Counted.rows is None else hidden_states[_Counted.rows]
