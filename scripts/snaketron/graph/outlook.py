"""Which trainings a run contains, and what each of them will do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from snaketron.config import Config
from snaketron.config.data import SPLITS
from snaketron.files import read_json, sha256, to_json
from snaketron.graph.snakemake.reasons import key_of
from snaketron.jobs.inventory import look
from snaketron.jobs.version import Version
from snaketron.lineage.record import read
from snaketron.log import UserError
from snaketron.settings.blends import PhaseSettings
from snaketron.sizes.epochs import resized
from snaketron.sizes.outlook import Inputs, Planned, Progress, outlook, planned
from snaketron.sizes.speed import speed

import orjson

RULES = ("pretrain", "sft", "lora", "merge_lora")


class Outlook(NamedTuple):
    """What a training among the jobs of a run will do."""

    name: str
    words: str
    numbers: Planned


def trainings(config: Config, dag: Any) -> list[Outlook]:
    """The trainings among the jobs that run, or would run, in their order."""
    jobs = [job for job in dag.needrun_jobs(exclude_finished=False) if job.rule.name in RULES]
    phases = ["", *(phase.name for phase in config.pretrain.phases)]
    jobs.sort(key=lambda job: (RULES.index(job.rule.name), phases.index(job.wildcards.get("phase", ""))))
    # The identity of each file that is made, where it is known ahead.
    makers = {str(file): job for job in dag.needrun_jobs(exclude_finished=False) for file in job.output}
    known: dict[str, str | None] = dict.fromkeys(makers)
    makers = {file: job for file, job in makers.items() if job.rule.name == "blend_pretrain"}
    found = []
    for job in jobs:
        settings = json.loads(job.params.settings)
        output = str(job.output[0])
        training = config.training("lora" if job.rule.name == "merge_lora" else settings["stage"])
        inputs = _inputs(dag, job, known, makers)
        progress = look(Path(output), settings, inputs, partial(key_of, config, training))
        known[output] = progress.identity
        found.append(Outlook(settings["stage"], *_of_training(config, job, settings, progress)))
    return found


def lines(found: Sequence[Outlook]) -> list[str]:
    """Names and words, below each other.

    >>> lines([Outlook("sft", "trains", Planned()), Outlook("pretrain/mixed_1m_1", "continues", Planned())])
    ['sft                 trains', 'pretrain/mixed_1m_1 continues']
    """
    width = max((18, *(len(one.name) for one in found)))
    return [f"{one.name:{width}} {one.words}" for one in found]


def _of_training(
    config: Config, job: Any, settings: dict[str, Any], progress: Progress
) -> tuple[str, Planned]:
    if job.rule.name == "merge_lora":
        merged = "was merged before and is only published"
        return merged if progress.finished else "adds the adapters to their base", Planned()
    training = config.training(settings["stage"])
    found = speed(config, training)
    numbers = (
        settings["train_iters"],
        settings["global_batch_size"] * settings["seq_length"],
        found.tokens_per_second * training.run.parallel.world_size if found else None,
    )
    return outlook(progress, *numbers), planned(progress, *numbers)


def _inputs(dag: Any, job: Any, known: dict[str, str | None], makers: Mapping[str, Any]) -> Inputs | None:
    """What a training is made from; None where the identity of an input is not known ahead.

    Args:
        dag: the graph.
        job: its job.
        known: of the files that this run makes, the identity where that is known ahead.
        makers: the jobs that make blends of pretraining, by their files.
    """
    path, tokenizer = str(job.input.blend), str(job.input.tokenizer)
    if tokenizer in known or any(not Path(file).exists() for file in (path, tokenizer)):
        return None
    content: bytes | None = Path(path).read_bytes()
    if path in known:
        content = _longer(dag, makers[path], Path(path), known) if path in makers else None
    if content is None:
        return None
    found = [hashlib.sha256(content).hexdigest(), sha256(Path(tokenizer))]
    for checkpoint in _checkpoints(job):
        if checkpoint not in known:
            try:
                record = read(Version(Path(checkpoint)).record)
            except UserError:  # the training will say so
                return None
            found.append(record.version)
        elif identity := known[checkpoint]:
            found.append(identity)
        else:
            return None
    return Inputs(found, orjson.loads(content) if job.rule.name == "pretrain" else None)


def _longer(dag: Any, job: Any, path: Path, known: Mapping[str, str | None]) -> bytes | None:
    """What blend.json will hold where nothing but the number of tokens has changed; else None."""
    if any(str(file) in known for file in job.input) or not path.exists():
        return None
    reason = dag.reason(job)
    if reason.updated_input or reason.updated_input_run or reason.missing_output:
        return None
    blend = read_json(path)
    settings = PhaseSettings.model_validate_json(job.params.settings)
    total = sum(settings.of_split("train").values())
    wanted = {name: weight / total for name, weight in settings.weights.items()}
    asked, shards = dict[str, float](), 0
    for split in SPLITS:  # a corpus that is held out as a whole is in its split alone
        own = [c for c in blend[split]["corpora"] if settings.splits.get(c["corpus"], "train") == split]
        asked |= {c["corpus"]: c["asked"] for c in own}
        names = {c["corpus"] for c in own}
        shards += sum(c["empty_shards"] for c in own)
        shards += sum(shard["corpus"] in names for shard in blend[split]["shards"])
    if wanted != asked or shards != len(job.input.records):
        return None
    return to_json(resized(blend, settings.train_tokens))


def _checkpoints(job: Any) -> Iterable[str]:
    for name in ("base", "adapters"):
        given = getattr(job.input, name, [])
        yield from [given] if isinstance(given, str) else given
