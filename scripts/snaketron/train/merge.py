"""Adapters added to their base: a full checkpoint, published as those of trainings are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from snaketron.jobs import version as versions
from snaketron.log import UserError, logger
from snaketron.train.metrics import Metrics
from snaketron.train.stage import Stage

import yaml


def check_adapters(stage: Stage, adapters: Path) -> None:
    """`UserError` unless the adapters are those of the settings and of the base that the command names."""
    trained = yaml.safe_load((adapters / "config.yaml").read_text())
    ours = stage.settings.model_dump() | {"stage": trained["settings"]["stage"]}
    if differ := [key for key in ours if trained["settings"].get(key) != ours[key]]:
        raise UserError(
            f"{adapters} was trained with other settings ({', '.join(differ)}); run `snakemake ckpt/lora` "
            "first"
        )
    bases = [entry["version"] for entry in trained["inputs"] if "version" in entry]
    if stage.base is None or versions.identity(stage.base) not in bases:
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
    from snaketron.train.loop import Trainer, distributed, is_writer

    check_adapters(stage, adapters)
    with distributed(stage.settings, stage.run):
        trainer = Trainer(stage.settings, stage.run, stage.tokenizer.vocab_size)
        trainer.start_from(stage.base, with_optimizer=False)
        if not trainer.resume(adapters) or trainer.iteration != stage.settings.train_iters:
            raise UserError(f"{adapters}: not the end of its training; run `snakemake ckpt/lora` again")
        batches, metrics = (
            make_batches(stage),
            Metrics(stage.directory / "metrics.jsonl", 0, writer=is_writer()),
        )
        steps, has_valid = trainer.iteration, batches.has("valid")
        before = trainer.evaluate(batches, "valid") if has_valid else {}
        lora.merge(trainer.model)
        after = trainer.evaluate(batches, "valid") if has_valid else {}
        for losses in (before, after) if has_valid else ():
            metrics.write(iteration=steps, **losses)
        if is_writer() and has_valid:
            logger.info(
                "%s: validation loss %.6f with adapters, %.6f merged",
                stage.settings.stage,
                before["valid_loss"],
                after["valid_loss"],
            )
        progress = {"iteration": steps}
        trainer.saver.save(stage.directory, steps, lora.Part(trainer.model, adapters=False), None, progress)
        trainer.saver.finish()
    if stage.rank == 0:
        stage.write_config()
        stage.write_record(
            {
                "iterations": 0,
                "tokens": 0,
                "valid_loss_before": before.get("valid_loss"),
                "valid_loss_after": after.get("valid_loss"),
                "test_loss": None,
                "train_seconds": 0.0,
            }
        )
    return 0
