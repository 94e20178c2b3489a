"""Answers of a model to a few held-out prompts, to see what tuning does."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from snaketron.data.chats.packs import Pack
from snaketron.data.tokenizer import load_tokenizer
from snaketron.files import write_json
from snaketron.inference.generate import finish_reason, generate
from snaketron.jobs.launch import is_writer, rank
from snaketron.log import logger
from snaketron.model.build import BuiltModel
from snaketron.train.sft_batches import SftBatches
from snaketron.train.stage import Stage
from snaketron.wording import after, plural

import numpy as np


@dataclass(frozen=True)
class Prompt:
    """A conversation up to its first answer, and that answer as it was written."""

    input_ids: list[int]
    reference: list[int]


def held_out_prompts(batches: SftBatches, count: int) -> list[Prompt]:
    """Up to `count` prompts of validation packs: the first conversation of each, then the second, and so on.

    So few prompts are of as many sources as there are.
    """
    valid = batches.splits["valid"]
    first: dict[tuple[int, int], int] = {}  # a small split is read more than once
    for index, place in enumerate(zip(valid.sources.tolist(), valid.packs.tolist(), strict=True)):
        first.setdefault(place, index)
    packs = [batches.pack("valid", index)[1] for index in [*first.values()][:count]]
    rounds = itertools.zip_longest(*map(_prompts, packs))
    return list(itertools.islice((prompt for turn in rounds for prompt in turn if prompt), count))


def _prompts(pack: Pack) -> Iterator[Prompt]:
    """The conversations of a pack, each up to its first answer."""
    for start, end in itertools.pairwise([*map(int, pack.seq_start_id), len(pack.input_ids)]):
        trained = np.flatnonzero(pack.loss_mask[start:end]) + 1  # the mask is that of the label, one further
        if len(trained):
            last = int(np.argmax(np.append(np.diff(trained), 2) > 1))  # where the first answer ends
            ids = pack.input_ids[start : start + int(trained[last]) + 1].tolist()
            yield Prompt(ids[: int(trained[0])], ids[int(trained[0]) :])


def write_answers(stage: Stage, built: BuiltModel, iteration: int, batches: SftBatches) -> None:
    """Write the answers of the model as it is now to the version, in a file of its own for each step."""
    text = load_tokenizer(stage.tokenizer_directory)
    if stage.run.num_samples and is_writer():
        what = plural(stage.run.num_samples, "prompt")
        logger.info("%s: answering %s %s", stage.settings.stage, what, after(iteration))
    prompts = held_out_prompts(batches, stage.run.num_samples)
    stop = {prompt.reference[-1] for prompt in prompts}
    given = generate(
        built,
        [prompt.input_ids for prompt in prompts],
        stop=stop,
        max_tokens=stage.run.sample_tokens,
        batch_size=16,
    )
    answers: list[dict[str, str]] = []
    for prompt, ids in zip(prompts, given, strict=True):
        entry = {"prompt": prompt.input_ids, "reference": prompt.reference, "answer": ids}
        texts = {name: text.decode(ids, skip_special_tokens=False) for name, ids in entry.items()}
        answers.append(texts | {"finish_reason": finish_reason(ids, stop)})
    if rank() == 0 and answers:
        write_json(stage.version.answers_after(iteration), answers)
