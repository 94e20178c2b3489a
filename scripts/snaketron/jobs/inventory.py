"""What lies below `<ckpt>/versions`: the state of each version, and whether anything still needs it."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from snaketron import files
from snaketron.jobs import continuation, slurm
from snaketron.jobs.attempts import read_attempts
from snaketron.jobs.owner import Holder, is_owned, own
from snaketron.jobs.version import Description, Version, published, version_key, versions
from snaketron.lineage.record import directory_name, read
from snaketron.log import UserError
from snaketron.sizes.outlook import Inputs, Progress
from snaketron.wording import short_duration, size_text

OUTCOMES = {
    "failed": "failed",
    "hung": "hung",
    "stopped": "stopped",
    "requeued": "stopped",
    "time limit": "stopped",
}


@dataclass
class Item:
    """A version as a person wants to know it."""

    version: Version
    state: str  # in words: finished, running (process 12 on vm), stopped at step 30 of 59
    is_running: bool  # or its Slurm job may go on with it
    links: list[Path]  # that publish it
    built_on: list[str]  # names of the versions that it was made from
    size: int  # bytes
    changed: float  # time of its last change
    unanswered: bool = False  # whether it may go on only because Slurm does not say whether it does
    needed_by: list[str] = field(default_factory=list)  # names of kept versions that were made from it
    is_kept: bool = False  # whether it is published, runs or may go on, or is the base of one that is kept

    @property
    def name(self) -> str:
        return self.version.directory.name

    @property
    def is_stopped(self) -> bool:
        """Whether running the same command again would continue it."""
        return not self.is_running and not self.version.is_finished

    @property
    def why(self) -> str:
        """What it is to the others: published, the base of another one, or superseded."""
        if self.links:
            return f"published as {', '.join(map(str, self.links))}"
        if self.needed_by:
            return f"{', '.join(self.needed_by)} was built on it"
        return "" if self.is_running or self.is_stopped else "superseded"

    def __str__(self) -> str:
        age = short_duration(time.time() - self.changed)
        words = ", ".join(filter(None, (self.state, self.why)))
        return f"{self.name:32} {size_text(self.size):>9} {age:>9}  {words}"


def inventory(root: Path, *, keep_stopped: bool = True, keep_bases: bool = True) -> list[Item]:
    """The versions below `<root>/versions` by name, each with what needs it.

    A version is needed by those that are kept themselves: the published and the running ones, interrupted
    ones with `keep_stopped`, and with `keep_bases` whatever they were built on.
    """
    links = _links(root)
    items = sorted((_item(version, links) for version in versions(root)), key=lambda item: item.name)
    by_name = {item.name: item for item in items}
    kept = [i for i in items if i.links or i.is_running or (keep_stopped and i.is_stopped)]
    for item in kept if keep_bases else ():  # the list grows
        for base in filter(None, map(by_name.get, item.built_on)):
            base.needed_by.append(item.name)
            if base not in kept:
                kept.append(base)
    for item in kept:
        item.is_kept = True
    return items


def superseded(items: Iterable[Item]) -> list[Item]:
    """Those that nothing needs, oldest first."""
    return sorted((item for item in items if not item.is_kept), key=lambda item: item.changed)


def look(
    output: Path,
    settings: dict[str, Any],
    inputs: Inputs | None,
    key_of: continuation.KeyOf = continuation.key_in_job,
) -> Progress:
    """How far the training is that would be published as `output`.

    Args:
        output: its link, `<ckpt>/<stage>`.
        settings: what defines its result, as the training gets it.
        inputs: what it is made from; None where the identity of one is not known before it is made.
        key_of: names the key of the configuration that a setting comes from.
    """
    stage = settings["stage"]
    others = versions(output.parents[stage.count("/")])
    speed = _speed([version for version in others if version.is_of(stage)])
    if inputs is None:
        before = published(output)
        why = continuation.other_settings(before, settings, key_of)
        return Progress(
            tokens_per_second=speed, starts_over=why, published=before.latest_iteration() is not None
        )
    key = version_key(settings, list(inputs.identities))
    version = Version.of(output, stage, key)
    done = version.latest_iteration() or 0
    begun = Progress(f"{stage}-{key}", done, version.is_finished, speed)
    if version.is_finished or done:
        return begun
    if origin := continuation.find(version, settings, inputs):
        return replace(begun, done=origin.iteration, origin=origin.version.directory.name)
    why = continuation.why_not(version, published(output), settings, inputs, key_of)
    return replace(begun, starts_over=why)


def _speed(of_stage: list[Version]) -> float | None:
    """Tokens a second of the version that was finished last; None where there is none."""
    records = [version.record for version in of_stage if version.is_finished]
    for path in sorted(records, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            counts = read(path).counts
        except UserError:  # of another time
            continue
        if counts.get("tokens") and counts.get("train_seconds"):
            return float(counts["tokens"] / counts["train_seconds"])
    return None


def remove(version: Version, root: Path) -> bool:
    """Delete a version below `root`, or what is left of it; False when a link leads to it by now.

    It is absent at once, so a killed deletion leaves no version of which a part is gone. Raises `UserError`
    when a process is training in it.
    """
    with own(version):
        if version.directory.resolve() in _links(root):
            return False
        condemned = files.partial(version.directory)
        shutil.rmtree(condemned, ignore_errors=True)
        version.directory.rename(condemned)
        shutil.rmtree(condemned)
    return True


def remove_leftovers(root: Path) -> None:
    """Delete what killed deletions left."""
    for leftover in (root / "versions").glob(".*.partial"):
        shutil.rmtree(leftover)


def _links(root: Path) -> dict[Path, list[Path]]:
    """The links below `root` that publish something, by the directory that they lead to.

    Raises `OSError` where a directory cannot be read: a version that a link in it needs would be deleted.
    """

    def fail(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    found: dict[Path, list[Path]] = {}
    for directory, below, _ in os.walk(root, onerror=fail):
        if Path(directory) == root and "versions" in below:
            below.remove("versions")
        for name in below:
            if (path := Path(directory, name)).is_symlink():
                found.setdefault(path.resolve(), []).append(path)
    return found


def _item(version: Version, links: dict[Path, list[Path]]) -> Item:
    config = _config(version)
    size, changed = 0, version.directory.stat().st_mtime
    for path in _files(version.directory):
        with contextlib.suppress(FileNotFoundError):  # a training replaces its checkpoints
            size += path.stat().st_size
            changed = max(changed, path.stat().st_mtime)
    state, is_running = state_of(version, config), is_owned(version)
    if is_running:
        state = f"running ({Holder.of(version)})"
    unanswered = ""
    if not is_running and not version.is_finished and (holder := Holder.of(version)) and holder.job:
        try:
            is_running = slurm.goes_on(holder.job)
        except slurm.NoAnswer as error:
            is_running, unanswered = True, f"; {error.last}"
        state += f", may go on ({holder}{unanswered})" if is_running else ""
    return Item(
        version,
        state,
        is_running,
        links.get(version.directory.resolve(), []),
        [directory_name(entry.version) for entry in config.inputs if entry.version] if config else [],
        size,
        changed,
        bool(unanswered),
    )


def state_of(version: Version, config: Description | None = None) -> str:
    """Finished, or how the last attempt ended and the step from which the next one would continue."""
    if version.is_finished:
        return "finished"
    config = config or _config(version)
    attempts = read_attempts(version.attempts)
    outcome = OUTCOMES.get(attempts[-1].outcome or "", "killed") if attempts else "stopped"
    total = config and config.settings.get("train_iters")
    return f"{outcome} at step {version.latest_iteration() or 0}" + (f" of {total}" if total else "")


def _config(version: Version) -> Description | None:
    return version.describe() if version.config.exists() else None


def _files(directory: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(directory):
        yield from (Path(parent, name) for name in names if not Path(parent, name).is_symlink())
