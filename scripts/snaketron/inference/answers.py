"""Answers of a model to a few held-out prompts, to see what tuning does."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from snaketron.data.tokenizer import load_tokenizer
from snaketron.files import write_json
from snaketron.inference.evaluate import of_pack
from snaketron.inference.generate import finish_reason, generate
from snaketron.jobs.launch import is_writer, rank
from snaketron.log import logger
from snaketron.model.build import BuiltModel
from snaketron.train.sft_batches import SftBatches
from snaketron.train.stage import Stage
from snaketron.wording import after, plural


class Prompt(NamedTuple):
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
    rounds = itertools.zip_longest(*map(of_pack, packs))
    asked = (one for turn in rounds for one in turn if one)
    return [Prompt(*next(one.answers())) for one in itertools.islice(asked, count)]


def _tell_too_long(stage: Stage, prompts: list[Prompt]) -> None:
    """Say how many answers are cut whatever the model learns, so that they count as wrong."""
    name, most = stage.settings.stage, stage.run.sample_tokens
    lengths = [len(prompt.reference) for prompt in prompts]
    if longer := sum(length > most for length in lengths):
        logger.warning(
            "%s: %d of %d answers of the data have more than %s (%s.sample_tokens), up to %d: those of the "
            "model are cut there, and count as not exact",
            *(name, longer, len(prompts), plural(most, "token"), name, max(lengths)),
        )


def write_answers(stage: Stage, built: BuiltModel, iteration: int, batches: SftBatches) -> None:
    """Write the answers of the model as it is now to the version, in a file of its own for each step."""
    text = load_tokenizer(stage.tokenizer_directory)
    prompts = held_out_prompts(batches, stage.run.num_samples)
    if prompts and is_writer():
        what = plural(len(prompts), "prompt")
        logger.info("%s: answering %s %s", stage.settings.stage, what, after(iteration))
        if not iteration:
            _tell_too_long(stage, prompts)
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
