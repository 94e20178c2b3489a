"""Export a checkpoint of this workflow: its tensors, its tokenizer, and what its records say."""

from __future__ import annotations

import os
from pathlib import Path

from snaketron.data.chats.environment import special_tokens
from snaketron.data.chats.mask import end_of_turn
from snaketron.data.chats.template import load_template
from snaketron.data.chats.unusable import Unusable
from snaketron.data.tokenizer import load_tokenizer, tokenizer_info
from snaketron.huggingface.card import card
from snaketron.huggingface.save import Checkpoint, export
from snaketron.jobs.version import Version
from snaketron.lineage.record import Entry, Record, read
from snaketron.lineage.walk import ancestors
from snaketron.log import UserError
from snaketron.settings.training import settings_of_checkpoint

import yaml


def export_checkpoint(path: Path, output: Path) -> Record:
    """Write the finished checkpoint at `path`, such as ckpt/sft, to the directory `output`.

    Raises `UserError` where it is no finished checkpoint, holds adapters, or cannot be read.
    """
    version = Version(path)
    identity = version.identity
    settings = settings_of_checkpoint(yaml.safe_load(version.config.read_text())["settings"])
    if settings.stage == "lora":
        raise UserError(f"{path} holds adapters and not the model; export ckpt/lora_merged")
    iteration = version.latest_iteration()
    if iteration is None:
        raise UserError(f"{path}: no checkpoint there")
    tokenizer = tokenizer_info(version.tokenizer)
    stops = [tokenizer.eos_id]
    if settings.packed and (end := end_of_answer(version.tokenizer)) not in (None, tokenizer.eos_id):
        assert end is not None
        stops.append(end)
    record = read(version.record)
    before = [one for one in ancestors(record.inputs).values() if one.kind == "checkpoint"]
    checkpoint = Checkpoint(
        tensors=version.iteration_directory(iteration),
        tokenizer=version.tokenizer,
        model=settings.model,
        seq_length=settings.seq_length,
        vocab_size=tokenizer.vocab_size,
        eos_token_ids=stops,
        pad_token_id=tokenizer.pad_id,
    )
    return export(
        checkpoint,
        output,
        # The version itself: the link may lead to another one when somebody follows the record.
        source=Entry("checkpoint", os.path.relpath(path.resolve()), version=identity),
        card=card(record, settings.model, tokenizer.vocab_size, before),
    )


def end_of_answer(tokenizer: Path) -> int | None:
    """The id of the token that ends an answer, by the chat template; None where there is none."""
    if not (tokenizer / "chat_template.jinja").exists():
        return None
    try:
        template = load_template(tokenizer / "chat_template.jinja", special_tokens(tokenizer))
        return end_of_turn(template, load_tokenizer(tokenizer))
    except (UserError, Unusable):
        return None  # a checkpoint of pretraining may have a template that no conversation was rendered with
