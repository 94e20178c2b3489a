"""The most likely continuation of a text, token by token, by a model in any parallel layout."""

from __future__ import annotations

from typing import Any

from snaketron.model import backend
from snaketron.model.build import BuiltModel
from snaketron.model.megatron import internals

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

MULTIPLE = 64  # lengths are rounded up to it, so that few shapes occur; any tensor parallel size divides it


def generate(built: BuiltModel, prompt: list[int], *, stop: int, max_tokens: int) -> list[int]:
    """The ids that follow the prompt, up to the first `stop` or `max_tokens` of them.

    Every rank must call this; all get the same ids. It computes the whole sequence for each token, so it is
    meant for a few short answers.
    """
    ids, limit = list(prompt), min(len(prompt) + max_tokens, built.settings.seq_length)
    with built.evaluating(), internals.without_mtp(built.model):
        while len(ids) < limit:
            ids.append(next_token(built, ids))
            if ids[-1] == stop:
                break
    return ids[len(prompt) :]


def next_token(built: BuiltModel, ids: list[int]) -> int:
    """The id with the highest logit after `ids`, the same on all ranks."""
    device = backend.device()
    outputs = _logits(built, ids, device)
    # Only the last pipeline stage has logits; the last rank is in it.
    best = torch.zeros(1, dtype=torch.int64, device=device)
    if outputs:
        best[0] = outputs[0][0, len(ids) - 1, : built.vocab_size].argmax()
    torch.distributed.broadcast(best, src=torch.distributed.get_world_size() - 1)
    return int(best)


def _logits(built: BuiltModel, ids: list[int], device: torch.device) -> list[torch.Tensor]:
    """One tensor (1, length, padded vocabulary) on the last pipeline stage, none on the others."""
    length = -(-len(ids) // MULTIPLE) * MULTIPLE
    tokens = torch.zeros(1, length, dtype=torch.int64, device=device)
    tokens[0, : len(ids)] = torch.tensor(ids, device=device)
    positions = torch.arange(length, device=device)[None]

    def forward(_batches: Any, model: Any) -> tuple[torch.Tensor, Any]:
        logits = model(tokens, positions, None, runtime_gather_output=True)
        return logits, lambda output, non_loss_data=False: output

    return get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=None,
        model=[built.module],
        num_microbatches=1,
        seq_length=length,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
