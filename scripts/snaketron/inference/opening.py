"""The model of a checkpoint, without the training that made it: to have it answer, and to evaluate it."""

from __future__ import annotations

from pathlib import Path

from snaketron.data.tokenizer import tokenizer_info
from snaketron.inference.prompting import longest_sequence
from snaketron.jobs.version import Version
from snaketron.lineage.record import directory_name, read
from snaketron.log import UserError
from snaketron.model.build import BuiltModel, build_model
from snaketron.model.lora import freeze
from snaketron.settings.training import RunSettings, settings_of_checkpoint


def open_checkpoint(path: Path, run: RunSettings | None = None) -> BuiltModel:
    """The model of a finished checkpoint such as ckpt/sft, with its weights and no optimizer.

    The weights of a checkpoint of adapters (ckpt/lora) are those of its base, with the adapters beside them.
    What was trained in fp8 or nvfp4 has weights in bf16, and answers in bf16 on any machine.
    It reads texts as long as an export of it says.

    Args:
        path: a version, or the link to one.
        run: the layout, which need not be that of the training; None: this process alone. `distributed` must
            have been entered with it.

    Raises:
        UserError: no finished checkpoint is there, its base is gone, or this machine cannot compute it.
    """
    version = Version(path)
    version.check_finished()
    settings = settings_of_checkpoint(version.describe().settings)
    if settings.model.precision != "fp32":
        model = settings.model.model_copy(update={"precision": "bf16"})
        settings = settings.model_copy(update={"model": model})
    settings = settings.model_copy(update={"seq_length": longest_sequence(version)})
    vocab_size = tokenizer_info(version.tokenizer).vocab_size
    built = build_model(settings, run or RunSettings(tracking="off"), vocab_size, draw=False)
    if not built.adapters:  # which have frozen it
        freeze(built.model)
    built.load_base(base_of(version) if built.adapters else path)
    if built.adapters:
        built.load_trained(path)
    return built


def base_of(version: Version) -> Path:
    """The directory of the checkpoint that adapters were trained on, beside their own."""
    (entry,) = read(version.record).inputs_named("base")
    base = version.directory.resolve().with_name(directory_name(entry.version))
    elsewhere = Version(entry.file)
    if not base.is_dir() and elsewhere.is_finished and elsewhere.identity == entry.version:
        return elsewhere.directory  # below another root of checkpoints
    if not base.is_dir():
        raise UserError(f"{version.directory} holds adapters of {base}, which is not there any more")
    return base
