"""Answers of a model to a few held-out prompts, to see what tuning does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from snaketron.data import tokenizer as tokenizers
from snaketron.files import write_json
from snaketron.model import backend
from snaketron.report.run import ANSWERS
from snaketron.train.batches import SftBatches
from snaketron.train.loop import Trainer
from snaketron.train.stage import Stage

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

MULTIPLE = 64  # lengths are rounded up to it, so that few shapes occur; any tensor parallel size divides it


@dataclass(frozen=True)
class Prompt:
    """A conversation up to its first answer, and that answer as it was written."""

    input_ids: list[int]
    reference: list[int]


def held_out_prompts(batches: SftBatches, count: int) -> Iterator[Prompt]:
    """Prompts of the first `count` validation packs, one of each."""
    if not batches.has("valid"):
        return
    for index in range(min(count, len(batches.order["valid"][0]))):
        _, pack = batches.pack("valid", index)
        end = pack.seq_start_id[1] if len(pack.seq_start_id) > 1 else len(pack.input_ids)
        trained = np.flatnonzero(pack.loss_mask[:end]) + 1  # the mask is that of the label, one further
        first = int(trained[0])
        last = first + int(np.argmax(np.append(np.diff(trained), 2) > 1))
        yield Prompt(pack.input_ids[:first].tolist(), pack.input_ids[first : last + 1].tolist())


def answer(trainer: Trainer, prompt: Prompt, max_tokens: int) -> list[int]:
    """The most likely continuation, token by token, up to the token that ended the reference.

    Every rank must call it; all get the same ids. It computes the whole sequence for each token: meant for a
    few short answers, in every parallel layout.
    """
    ids = list(prompt.input_ids)
    stop, limit = prompt.reference[-1], min(len(ids) + max_tokens, trainer.settings.seq_length)
    trainer.parallel_model.eval()
    with torch.no_grad(), _without_mtp(trainer):
        while len(ids) < limit:
            ids.append(_next_token(trainer, ids))
            if ids[-1] == stop:
                break
    trainer.parallel_model.train()
    return ids[len(prompt.input_ids) :]


def write_answers(stage: Stage, trainer: Trainer, batches: SftBatches) -> None:
    """Write the answers of the model as it is now to the version, in a file of its own for each step."""
    text = tokenizers.load(stage.tokenizer_directory)
    answers: list[dict[str, str]] = []
    for prompt in held_out_prompts(batches, stage.run.num_samples):
        ids = answer(trainer, prompt, stage.run.sample_tokens)
        entry = {"prompt": prompt.input_ids, "reference": prompt.reference, "answer": ids}
        answers.append({name: text.decode(ids, skip_special_tokens=False) for name, ids in entry.items()})
    if stage.rank == 0 and answers:
        directory = stage.directory / ANSWERS
        directory.mkdir(exist_ok=True)
        write_json(directory / f"step_{trainer.iteration:07d}.json", answers)


@contextlib.contextmanager
def _without_mtp(trainer: Trainer) -> Iterator[None]:
    """Leave multi-token prediction out, which costs twice the rest of a tiny model and changes no answer."""
    process, trainer.model.mtp_process = trainer.model.mtp_process, False
    try:
        yield
    finally:
        trainer.model.mtp_process = process


def _next_token(trainer: Trainer, ids: list[int]) -> int:
    length = -(-len(ids) // MULTIPLE) * MULTIPLE
    device = backend.device()
    tokens = torch.zeros(1, length, dtype=torch.int64, device=device)
    tokens[0, : len(ids)] = torch.tensor(ids, device=device)
    positions = torch.arange(length, device=device)[None]

    def forward(_batches: Any, model: Any) -> tuple[torch.Tensor, Any]:
        logits = model(tokens, positions, None, runtime_gather_output=True)
        return logits, lambda output, non_loss_data=False: output

    outputs = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=None,
        model=[trainer.parallel_model],
        num_microbatches=1,
        seq_length=length,
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    # Only the last pipeline stage has logits; the last rank is in it.
    best = torch.zeros(1, dtype=torch.int64, device=device)
    if outputs:
        best[0] = outputs[0][0, len(ids) - 1, : trainer.vocab_size].argmax()
    torch.distributed.broadcast(best, src=torch.distributed.get_world_size() - 1)
    return int(best)
