"""What a training goes on from that was made longer: a checkpoint of a version that began in the same way.

Another number of steps is another version. It begins like the first one as long as data and learning rates
are the same: up to where the rate of one of them falls. The last checkpoint from before is taken over into
the new version, so that it ends with the same bytes as one that was trained from its first step.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from snaketron import files
from snaketron.config import Optimizer
from snaketron.jobs.lines import read_metrics
from snaketron.jobs.version import Description, Version, versions
from snaketron.log import UserError
from snaketron.settings.schedule import Schedule, same_steps
from snaketron.settings.training import RunSettings
from snaketron.sizes.epochs import resized
from snaketron.sizes.outlook import Inputs
from snaketron.wording import some

import orjson
from pydantic import ValidationError

# What makes a training longer; all other settings must be the same.
LENGTH = ("train_iters", "schedule")
OF_INPUTS = ("the data", "the tokenizer", "the checkpoint that it starts from")


type KeyOf = Callable[[str], str]


def key_in_job(setting: str) -> str:
    """The name of a setting where no configuration is at hand: its own, unless no key is called so."""
    return "pretrain.phases[].seed" if setting == "data_seed" else setting


@dataclass(frozen=True)
class Origin:
    """The checkpoint of another version that a training goes on from."""

    version: Version
    iteration: int

    def __str__(self) -> str:
        return f"step {self.iteration:,} of {self.version.directory.name}"


def find(version: Version, settings: dict[str, Any], inputs: Inputs) -> Origin | None:
    """The latest checkpoint of another version that a new version of these settings can go on from."""
    found, damaged = [], _deleted(version)
    for other in _others(version, settings["stage"]):
        config = _config(other)
        if config and not _differences(config, settings, inputs):
            steps = min(_same_steps(config.settings, settings), settings["train_iters"] - 1)
            steps = min(steps, other.latest_iteration() or 0)
            if other.directory.name in damaged:
                steps = min(steps, damaged[other.directory.name] - 1)
            there = [n for n in other.iterations() if 0 < n <= steps]
            found += [(there[-1], other.directory.name, other)] if there else []
    if not found:
        return None
    iteration, _, origin = max(found, key=lambda one: one[:2])
    return Origin(origin, iteration)


def _deleted(version: Version) -> dict[str, int]:
    """By its version, the checkpoint that this one was begun with and that a person has deleted here.

    It could not be read, as the training said; its other name leads to the same bytes.
    """
    if not version.latest.exists() or not version.origin.exists() or version.latest_iteration() is not None:
        return {}
    origin = files.read_json(version.origin)
    return {origin["version"]: origin["iteration"]}


def why_not(
    version: Version, before: Version, settings: dict[str, Any], inputs: Inputs, key_of: KeyOf = key_in_job
) -> str:
    """Why a training does not go on from the version `before`, in words; empty where there is none.

    Args:
        key_of: names the key of the configuration that a setting comes from.
    """
    config = _config(before)
    if before.directory == version.directory or not config:
        return ""
    if differ := _differences(config, settings, inputs, key_of):
        return _other(differ)
    old = config.settings
    if settings["schedule"]["style"] == "cosine" and not _same_rates(settings):
        return "a cosine cannot be prolonged: the rate falls from the warm-up on"
    steps = _same_steps(old, settings)
    if steps == 0:
        return "its learning rate falls from the first step on, or is another one"
    return f"no checkpoint of the first {steps:,} steps is left, after which its learning rate is another one"


def other_settings(before: Version, settings: Mapping[str, Any], key_of: KeyOf = key_in_job) -> str:
    """`why_not`, as far as settings alone say it."""
    config = _config(before)
    differ = _other_than_length(config.settings, settings, key_of) if config else []
    return _other(differ) if differ else ""


def take_over(version: Version, origin: Origin, run: RunSettings) -> bool:
    """Begin a version with the checkpoint of another one, its metrics and answers; False where it is gone.

    The files of the checkpoint get a second name, or are copied where the file system has no such links. The
    version is as a training of its own length would have left it. What says so is written last.
    """
    target = version.iteration_directory(origin.iteration)
    aside = files.partial(target)
    try:
        for path in (aside, target):
            shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(
            origin.version.iteration_directory(origin.iteration), aside, copy_function=_link_or_copy
        )
    except (shutil.Error, FileNotFoundError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        if origin.version.iteration_directory(origin.iteration).exists():
            raise UserError(
                f"{target}: {origin} cannot be copied to it ({error}); see to that and run again"
            ) from None
        return False  # the other version is training, and deleted it
    lines = b"".join(orjson.dumps(line) + b"\n" for line in _metrics(origin, run))
    files.write_text(version.metrics, lines)
    for path in origin.version.all_answers():
        iteration = int(path.stem.removeprefix("step_"))
        if iteration < origin.iteration or (
            iteration == origin.iteration and _is_due(iteration, run.sample_interval)
        ):
            files.write_text(version.answers / path.name, path.read_bytes())
    files.write_json(
        version.origin, {"version": origin.version.directory.name, "iteration": origin.iteration}
    )
    aside.replace(target)
    version.name_latest(origin.iteration)
    return True


# ------------------------------------------------------------------------------------------- comparing


def _others(version: Version, stage: str) -> Iterator[Version]:
    for other in versions(version.directory.parent.parent):
        if other.is_of(stage) and other.directory.name != version.directory.name:
            yield other


def _config(version: Version) -> Description | None:
    """What a version was made of; None where that is not there or has another shape."""
    try:
        return version.describe()
    except UserError:
        return None


def _differences(
    config: Description, settings: Mapping[str, Any], inputs: Inputs, key_of: KeyOf = str
) -> list[str]:
    """What else than its length is different in a training, in words."""
    old = config.settings
    differ = _other_than_length(old, settings, key_of)
    there = [entry.identity for entry in config.inputs]
    wanted = list(inputs.identities)
    if inputs.blend and old.keys() >= settings.keys():
        samples = old["train_iters"] * old["global_batch_size"]
        wanted[0] = _sha256(resized(inputs.blend, samples * old["seq_length"]))
    names = [*OF_INPUTS, *["an input"] * len(wanted)]
    differ += [name for name, one, other in zip(names, there, wanted, strict=False) if one != other]
    return differ if len(there) == len(wanted) else [*differ, OF_INPUTS[-1]]


def _other_than_length(old: Mapping[str, Any], settings: Mapping[str, Any], key_of: KeyOf) -> list[str]:
    return [
        key_of(path)
        for key in dict.fromkeys((*settings, *old))
        if key not in LENGTH
        for path in _paths(key, old.get(key), settings.get(key))
    ]


def _other(differ: Sequence[str]) -> str:
    return f"other than before: {some(differ, 8)}"


def _paths(path: str, old: Any, new: Any) -> Iterator[str]:
    """Where two values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*new, *old)):
            yield from _paths(f"{path}.{key}", old.get(key), new.get(key))
    elif old != new:
        yield path


def _sha256(blend: Mapping[str, Any]) -> str:
    return hashlib.sha256(files.to_json(blend)).hexdigest()


def _same_steps(old: Mapping[str, Any], new: Mapping[str, Any]) -> int:
    try:
        one, other = (
            (
                Schedule.model_validate(values["schedule"]),
                Optimizer.model_validate(values["optimizer"]),
                values["train_iters"],
            )
            for values in (old, new)
        )
    except (KeyError, ValidationError):  # of another time
        return 0
    return same_steps(one, other)


def _same_rates(settings: Mapping[str, Any]) -> bool:
    optimizer = settings["optimizer"]
    return optimizer["learning_rate"] == optimizer["min_learning_rate"]


# --------------------------------------------------------------------------------------- taking over


def _metrics(origin: Origin, run: RunSettings) -> Iterator[dict[str, Any]]:
    """The lines that a longer training has up to here: not what only the end of the other one wrote."""
    at = origin.iteration
    for line in read_metrics(origin.version.metrics)[0]:
        is_due = _is_due(at, run.log_interval if "loss" in line else run.eval_interval)
        if line["iteration"] < at or (line["iteration"] == at and is_due and "test_loss" not in line):
            yield line


def _is_due(iteration: int, interval: int | None) -> bool:
    return interval is not None and iteration % interval == 0


def _link_or_copy(source: str, target: str) -> None:
    """Nobody writes into the files of a checkpoint, so a second name is as good as a copy."""
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy2(source, target)
