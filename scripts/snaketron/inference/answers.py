"""Answers of a model to a few held-out prompts, to see what tuning does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from snaketron.data.tokenizer import load_tokenizer
from snaketron.files import write_json
from snaketron.inference.generate import generate
from snaketron.jobs.launch import is_writer, rank
from snaketron.log import logger
from snaketron.model.build import BuiltModel
from snaketron.train.sft_batches import SftBatches
from snaketron.train.stage import Stage
from snaketron.wording import plural

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """A conversation up to its first answer, and that answer as it was written."""

    input_ids: list[int]
    reference: list[int]


def held_out_prompts(batches: SftBatches, count: int) -> Iterator[Prompt]:
    """Prompts of the first `count` validation packs, one of each."""
    for index in range(min(count, batches.splits["valid"].num_samples)):
        _, pack = batches.pack("valid", index)
        end = pack.seq_start_id[1] if len(pack.seq_start_id) > 1 else len(pack.input_ids)
        trained = np.flatnonzero(pack.loss_mask[:end]) + 1  # the mask is that of the label, one further
        first = int(trained[0])
        last = first + int(np.argmax(np.append(np.diff(trained), 2) > 1))
        yield Prompt(pack.input_ids[:first].tolist(), pack.input_ids[first : last + 1].tolist())


def answer(built: BuiltModel, prompt: Prompt, max_tokens: int) -> list[int]:
    """The most likely answer, up to the token that ended the reference; every rank must call this."""
    [ids] = generate(built, [prompt.input_ids], stop=prompt.reference[-1:], max_tokens=max_tokens)
    return ids


def write_answers(stage: Stage, built: BuiltModel, iteration: int, batches: SftBatches) -> None:
    """Write the answers of the model as it is now to the version, in a file of its own for each step."""
    text = load_tokenizer(stage.tokenizer_directory)
    answers: list[dict[str, str]] = []
    if stage.run.num_samples and is_writer():
        what = plural(stage.run.num_samples, "prompt")
        logger.info("%s: answering %s after step %d", stage.settings.stage, what, iteration)
    for prompt in held_out_prompts(batches, stage.run.num_samples):
        ids = answer(built, prompt, stage.run.sample_tokens)
        entry = {"prompt": prompt.input_ids, "reference": prompt.reference, "answer": ids}
        answers.append({name: text.decode(ids, skip_special_tokens=False) for name, ids in entry.items()})
    if rank() == 0 and answers:
        write_json(stage.version.answers_after(iteration), answers)
