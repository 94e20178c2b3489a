"""Add adapters to their base: a full checkpoint, published like that of a training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snaketron.jobs.launch import is_writer, rank
from snaketron.jobs.version import UNTRAINED, Version
from snaketron.log import UserError, logger
from snaketron.train.metrics import Metrics
from snaketron.train.stage import Stage

if TYPE_CHECKING:  # imports megatron-core (5 s)
    from snaketron.model.build import BuiltModel
    from snaketron.train.batches import Batches


def check_adapters(stage: Stage, adapters: Path) -> None:
    """Raise `UserError` unless the adapters were trained with these settings and on the named base."""
    trained = Version(adapters).describe()
    ours = stage.settings.model_dump() | {"stage": trained.stage}
    if differ := [key for key in ours if trained.settings.get(key) != ours[key]]:
        raise UserError(
            f"{adapters} was trained with other settings ({', '.join(differ)}); run `snakemake ckpt/lora` "
            "first"
        )
    bases = [entry.version for entry in trained.inputs if entry.version]
    if stage.base is None or Version(stage.base).identity not in bases:
        raise UserError(
            f"{adapters} was trained on {', '.join(bases)}, which {stage.base} is not (any more); run "
            "`snakemake ckpt/lora` to train on what it is now, or name the base as --base"
        )


def merge(stage: Stage, adapters: Path, make_batches: Callable[[Stage], Any]) -> int:
    """Merge, in the layout of the training, and measure the loss on both sides of it; the exit status.

    Each process adds its own parts; nothing is gathered. The checkpoint has no optimizer: it is a base for
    trainings, and what reads a checkpoint's weights finds those of ckpt/sft.
    """
    from snaketron.model import lora
    from snaketron.model.build import build_model
    from snaketron.model.checkpoint import Saver
    from snaketron.model.distributed import distributed

    check_adapters(stage, adapters)
    assert stage.base is not None
    steps = stage.settings.train_iters
    name = stage.settings.stage
    logger.info("%s: building the model and loading %s and %s", name, stage.base, adapters)
    with distributed(stage.settings.seed, stage.run):
        built = build_model(stage.settings, stage.run, stage.tokenizer.vocab_size)
        _load(built, stage.base, adapters)
        batches = make_batches(stage)
        logger.info("%s: computing the validation loss with adapters, and merged", name)
        before = _valid_losses(built, batches)
        lora.merge(built.model)
        after = _valid_losses(built, batches)
        _report(stage, before, after)
        saver = Saver.configured(stage.run)
        saver.save(stage.version.directory, steps, built.base, None, {"iteration": steps})
        saver.finish()
    if rank() == 0:
        stage.write_config()
        losses = {"valid_loss_before": before.get("valid_loss"), "valid_loss_after": after.get("valid_loss")}
        stage.write_record(UNTRAINED | losses)
    return 0


def _load(built: BuiltModel, base: Path, adapters: Path) -> None:
    built.load_base(base)
    progress = built.load_trained(adapters)
    if progress is None or progress["iteration"] != built.settings.train_iters:
        raise UserError(f"{adapters}: not the end of its training; run `snakemake ckpt/lora` again")


def _valid_losses(built: BuiltModel, batches: Batches) -> dict[str, Any]:
    """The losses on the validation split; none where there is no such split."""
    from snaketron.train.evaluate import evaluate

    return (evaluate(built, batches, "valid") or {}) if batches.has("valid") else {}


def _report(stage: Stage, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Write the losses with adapters and merged, a line each, and say them."""
    metrics = Metrics(stage.version.metrics, 0, writer=is_writer())
    if not before:
        return
    for losses in (before, after):
        metrics.write(iteration=stage.settings.train_iters, **losses)
    if is_writer():
        logger.info(
            "%s: validation loss %.6f with adapters, %.6f merged",
            stage.settings.stage,
            before["valid_loss"],
            after["valid_loss"],
        )
