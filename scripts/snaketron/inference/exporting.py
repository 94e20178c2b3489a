"""Export a checkpoint of this workflow: its tensors, its tokenizer, and what its records say."""

from __future__ import annotations

import os
from pathlib import Path

from snaketron.data.tokenizer import tokenizer_info
from snaketron.huggingface.adapters import export_adapters
from snaketron.huggingface.card import card
from snaketron.huggingface.save import Checkpoint, export
from snaketron.inference.prompting import ends_of_answers, longest_sequence
from snaketron.jobs.version import Version
from snaketron.lineage.record import Entry, Record, read
from snaketron.lineage.walk import ancestors, lost
from snaketron.log import UserError
from snaketron.settings.training import LoraSettings, TrainSettings, settings_of_checkpoint


def export_checkpoint(path: Path, output: Path, base: str | None = None) -> Record:
    """Write the finished checkpoint at `path`, such as ckpt/sft, to the directory `output`.

    `base` is the exported model below adapters (ckpt/lora), as transformers is to load it.
    Raises `UserError` where it is no finished checkpoint, or cannot be read or expressed; and where something
    else than an export is at `output`.
    """
    _check_place(output)
    version = Version(path)
    # The version itself: the link may lead to another one when somebody follows the record.
    source = Entry("checkpoint", os.path.relpath(path.resolve()), version=version.identity)
    settings = settings_of_checkpoint(version.describe().settings)
    checkpoint = _checkpoint(version, settings)
    if isinstance(settings, LoraSettings):
        if base is None:
            raise UserError(f"{path} holds adapters; name the exported model below them as --base")
        return export_adapters(checkpoint, settings.lora, output, base=base, source=source)
    record = read(version.record)
    before = list(ancestors(record.inputs).values())
    trained = [one for one in before if one.kind == "checkpoint"]
    text = card(record, settings.model, checkpoint.vocab_size, trained, lost([*before, record]))
    return export(checkpoint, output, source=source, card=text)


def _check_place(output: Path) -> None:
    """`UserError` where an export would take the place of what is none."""
    record = output / "record.json"
    if record.exists():
        replaced = read(record).kind == "export"
    else:
        replaced = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    if not replaced:
        raise UserError(f"{output} is there and no export, so it is not replaced; move it away")
    if output.is_symlink():
        raise UserError(f"{output} is a link to {output.readlink()}; name that directory, or remove the link")


def _checkpoint(version: Version, settings: TrainSettings) -> Checkpoint:
    if (tensors := version.tensors) is None:
        raise UserError(
            f"{version.directory}: no checkpoint there; run the training, or name one that is finished"
        )
    tokenizer = tokenizer_info(version.tokenizer)
    return Checkpoint(
        tensors=tensors,
        tokenizer=version.tokenizer,
        model=settings.model,
        seq_length=longest_sequence(version),
        vocab_size=tokenizer.vocab_size,
        eos_token_ids=ends_of_answers(version),
        pad_token_id=tokenizer.pad_id,
    )
