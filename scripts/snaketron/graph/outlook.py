"""Which trainings a run contains, and what each of them will do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from snaketron.config import Config
from snaketron.files import sha256
from snaketron.lineage.record import read
from snaketron.log import UserError
from snaketron.sizes.outlook import Progress, outlook
from snaketron.sizes.speed import speed

RULES = ("pretrain", "sft", "lora", "merge_lora")
# From the output of a training, its settings and the identities of its inputs to how far it is. Where an
# input is still to be made, there are no identities.
Look = Callable[[Path, dict[str, Any], list[str] | None], Progress]


def trainings(config: Config, dag: Any, look: Look) -> list[str]:
    """A line for each training among the jobs that run, or would run, in their order."""
    jobs = [job for job in dag.needrun_jobs(exclude_finished=False) if job.rule.name in RULES]
    phases = ["", *(phase.name for phase in config.pretrain.phases)]
    jobs.sort(key=lambda job: (RULES.index(job.rule.name), phases.index(job.wildcards.get("phase", ""))))
    # Of each file that is made, its identity where that is known ahead.
    known: dict[str, str | None] = dict.fromkeys(
        str(file) for job in dag.needrun_jobs(exclude_finished=False) for file in job.output
    )
    lines = []
    for job in jobs:
        settings = json.loads(job.params.settings)
        output = str(job.output[0])
        progress = look(Path(output), settings, _identities(job, known))
        known[output] = progress.identity
        lines.append(f"{settings['stage']:18} {_words(config, job, settings, progress)}")
    return lines


def _words(config: Config, job: Any, settings: dict[str, Any], progress: Progress) -> str:
    if job.rule.name == "merge_lora":
        merged = "was merged before and is only published"
        return merged if progress.finished else "adds the adapters to their base"
    training = config.training(settings["stage"])
    found = speed(config, training)
    return outlook(
        progress,
        settings["train_iters"],
        settings["global_batch_size"] * settings["seq_length"],
        found.tokens_per_second * training.run.parallel.world_size if found else None,
    )


def _identities(job: Any, known: dict[str, str | None]) -> list[str] | None:
    """What identifies the inputs of a training, in the order of its version key; None where one is unknown.

    Args:
        job: its job.
        known: of the files that this run makes, the identity where that is known ahead.
    """
    files = [str(job.input.blend), str(job.input.tokenizer)]
    if any(file in known or not Path(file).exists() for file in files):
        return None
    found = [sha256(Path(file)) for file in files]
    for checkpoint in _checkpoints(job):
        if checkpoint not in known:
            try:
                record = read(Path(checkpoint) / "record.json")
            except UserError:  # the training will say so
                return None
            found.append(f"{record.name}-{record.key}")
        elif identity := known[checkpoint]:
            found.append(identity)
        else:
            return None
    return found


def _checkpoints(job: Any) -> Iterable[str]:
    for name in ("base", "adapters"):
        given = getattr(job.input, name, [])
        yield from [given] if isinstance(given, str) else given
