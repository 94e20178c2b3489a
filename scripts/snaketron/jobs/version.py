"""Where a training keeps its state: a directory that Snakemake does not know, and a link to it.

A training works in `<ckpt>/versions/<stage>-<key>/`, where the key hashes what defines its result: a killed
run finds its checkpoints again, other settings get another directory, and settings that were trained before
are found finished. `<ckpt>/<stage>`, the output that Snakemake knows, is a link to it, made last. Until then
the link names the version that was published before.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from snaketron.files import partial, sha256_of, write_text
from snaketron.huggingface.config import copy_tokenizer
from snaketron.lineage.placed import Placed
from snaketron.lineage.record import Entry, Given, Record, directory_name, making, of_file, read
from snaketron.log import UserError

import yaml

# What the record of a checkpoint counts that was imported, merged or averaged, and not trained.
UNTRAINED: dict[str, Any] = {
    "iterations": 0,
    "tokens": 0,
    "train_seconds": 0.0,
    **dict.fromkeys(("valid_loss_before", "valid_loss_after", "test_loss")),
}


def version_key(settings: dict[str, Any], inputs: list[str]) -> str:
    """Hash of the settings that matter and of the inputs' identities, as 12 hexadecimal digits."""
    return sha256_of({"settings": settings, "inputs": inputs})[:12]


@dataclass(frozen=True)
class Description:
    """What the `config.yaml` of a version says: what defines its result, how it is run, and from what."""

    settings: dict[str, Any]  # perhaps of another version of Snaketron, so they are not `TrainSettings` yet
    inputs: Sequence[Entry] = ()  # without names
    tokenizer_sha256: str = ""
    run: dict[str, Any] = field(default_factory=dict)  # empty where nothing was trained

    @property
    def stage(self) -> str:
        return str(self.settings["stage"])

    @classmethod
    def read(cls, path: Path) -> Description:
        """Raises `UserError` where there is no such file, or it says something else."""
        try:
            value = yaml.safe_load(path.read_text(encoding="utf-8"))
            value["settings"]["stage"]
            inputs = [Entry(**{"name": "", "path": ""} | entry) for entry in value.get("inputs", ())]
            settings, run = dict(value["settings"]), dict(value.get("run") or {})
            return cls(settings, inputs, value.get("tokenizer_sha256", ""), run)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; the checkpoint is damaged") from None
        except (yaml.YAMLError, AttributeError, LookupError, TypeError, ValueError):
            raise UserError(
                f"{path}: not the configuration of a checkpoint; name one that this workflow made, or "
                "restore the file"
            ) from None

    def write(self, path: Path) -> None:
        value = {
            "settings": self.settings,
            **({"run": self.run} if self.run else {}),
            "inputs": [entry.reference for entry in self.inputs],
            "tokenizer_sha256": self.tokenizer_sha256,
        }
        write_text(path, yaml.safe_dump(value, sort_keys=False))


class Version:
    """A version directory, or a link to one: the names of everything in it, and its state."""

    def __init__(self, directory: Path) -> None:
        self.directory: Final = directory
        # What a training leaves to its readers.
        self.record: Final = directory / "record.json"  # of the lineage; says that the version is complete
        self.config: Final = directory / "config.yaml"  # the settings, how they were run, and the inputs
        self.tokenizer: Final = directory / "tokenizer"  # a directory
        self.latest: Final = directory / "latest_checkpointed_iteration.txt"  # as Megatron's tools call it
        self.metrics: Final = directory / "metrics.jsonl"
        self.answers: Final = directory / "answers"  # a directory with a file for each step with answers
        self.summary: Final = directory / "summary.md"
        self.origin: Final = directory / "origin.json"  # the shorter version that it went on from, if any
        self.log: Final = directory / "train.log"  # of all attempts
        # What the supervisor and its processes tell each other, and the next supervisor.
        self.lock: Final = directory / "lock"
        self.owner: Final = directory / "owner.json"
        self.attempts: Final = directory / "attempts.json"
        self.heartbeat: Final = directory / "progress.json"
        self.failures: Final = directory / "failures"  # a directory: what each process said of its failure

    @classmethod
    def of(cls, output: Path, stage: str, key: str) -> Version:
        """`<ckpt>/versions/<stage>-<key>` for the link `<ckpt>/<stage>`; a `/` in the stage becomes `_`."""
        root = output
        for _ in stage.split("/"):
            root = root.parent
        return cls(root / "versions" / directory_name(f"{stage}-{key}"))

    def is_of(self, stage: str) -> bool:
        return self.directory.name.rpartition("-")[0] == directory_name(stage)

    def describe(self) -> Description:
        """What its `config.yaml` says; `UserError` where there is none, or it says something else."""
        return Description.read(self.config)

    def answers_after(self, iteration: int) -> Path:
        return self.answers / f"step_{iteration:07d}.json"

    def all_answers(self) -> list[Path]:
        """The files of answers, in the order of their steps."""
        return sorted(self.answers.glob("step_*.json"))

    # ------------------------------------------------------------------------------------ checkpoints

    def iteration_directory(self, iteration: int) -> Path:
        return self.directory / f"iter_{iteration:07d}"

    def iterations(self) -> list[int]:
        """The steps after which there is a checkpoint, in order."""
        names = (path.name.removeprefix("iter_") for path in self.directory.glob("iter_*"))
        return sorted(int(name) for name in names if name.isdecimal())  # a person may keep iter_0000100.bak

    def latest_iteration(self) -> int | None:
        """Steps of the newest complete checkpoint; None when there is none.

        It is the one that `latest` names. Where a person deleted that because it cannot be read, it is the
        newest one before it.
        """
        try:
            latest = self._named()
        except FileNotFoundError:
            return None
        return max((iteration for iteration in self.iterations() if iteration <= latest), default=None)

    @property
    def tensors(self) -> Path | None:
        """Where the tensors lie: here if this is the directory of one iteration, or in that of the newest."""
        if (self.directory / ".metadata").exists():
            return self.directory
        latest = self.latest_iteration()
        return None if latest is None else self.iteration_directory(latest)

    def _named(self) -> int:
        """The steps of the checkpoint that `latest` names."""
        text = self.latest.read_text(encoding="utf-8").strip()
        if not text.isdecimal():
            raise UserError(
                f"{self.latest}: {text!r} is no iteration; name the directory that holds .metadata"
            )
        return int(text)

    def name_latest(self, iteration: int) -> None:
        """Say that the checkpoint after so many steps is complete, and the newest one."""
        write_text(self.latest, str(iteration))

    def remove_partial(self) -> None:
        """Delete checkpoints that a killed attempt left half-written or half-deleted."""
        pattern = f"{partial(self.directory / 'iter_').name.removesuffix('.partial')}*.partial"
        for leftover in self.directory.glob(pattern):
            shutil.rmtree(leftover, ignore_errors=True)

    # ------------------------------------------------------------------------------ finished, published

    @property
    def is_finished(self) -> bool:
        return self.record.exists()

    @property
    def identity(self) -> str:
        """The stage and version key of a finished checkpoint, whatever its link is called."""
        return self.check_finished().version

    def check_finished(self) -> Record:
        """The record of a finished checkpoint; `UserError` where there is none."""
        if not self.is_finished:
            if self.directory.is_dir():
                problem = f"it has no {self.record.name}"
            else:
                problem = "it is no directory" if self.directory.exists() else "it is not there"
        elif (record := read(self.record)).kind != "checkpoint":
            problem = f"its record is of the kind {record.kind}"
            if made_of := record.inputs_named("checkpoint"):
                problem += f", made of {Placed(self.record, record).place(made_of[0])}; name that"
        elif self.latest.exists() and not (last := self.iteration_directory(self._named())).is_dir():
            problem = f"its {last.name} is not there any more"
        else:
            return record
        raise UserError(f"{self.directory}: not a finished checkpoint of this workflow ({problem})")

    def complete(
        self,
        description: Description,
        tokenizer: Path,
        iteration: int,
        counts: Mapping[str, Any],
        *,
        inputs: Mapping[str, Given],
        started: float,
    ) -> None:
        """Write what says that the checkpoint after `iteration` is complete, where no training made it.

        Args:
            description: its settings, and what it was made from.
            tokenizer: directory whose files are copied.
            counts: for the record, beside those of `UNTRAINED`.
            inputs: for the record, by name.
            started: when its making began (`time.monotonic()`).
        """
        copy_tokenizer(tokenizer, self.tokenizer)
        description.write(self.config)
        self.name_latest(iteration)
        with making("checkpoint", description.stage, outputs={}, record=self.record, started=started) as job:
            files = sorted(self.iteration_directory(iteration).iterdir())
            job.present = [of_file(path.name, path) for path in files]
            job.inputs, job.settings = inputs, description.settings
            job.key = self.directory.name.rpartition("-")[2]
            job.counts = {**UNTRAINED, **counts}

    def ask(self, output: Path) -> None:
        """Note that this version is what a run wants as `output`, when the run begins with it.

        Raises `UserError` where `output` would lead elsewhere, because its directory is a link: `ckpt` may be
        one, and `ckpt/pretrain` may not.
        """
        published = Path(os.path.realpath(output.parent), self._seen_from(output))
        if os.path.realpath(published) != os.path.realpath(self.directory):
            raise UserError(
                f"{output.parent} is a link, from which {self._seen_from(output)} is not {self.directory}; "
                "put a directory in its place (it holds links alone), and run the same command again"
            )
        write_text(_asked(output), self.directory.name)

    def publish(self, output: Path) -> None:
        """Make `output` a link to this version, in one step.

        Raises `UserError` where a directory is in the way, or a run has asked for another version since: then
        this job has outlived its Snakemake, and would replace what the later one has made.
        """
        check_place(output)
        asked = _asked(output)
        if asked.exists() and (other := asked.read_text("utf-8")) != self.directory.name:
            raise UserError(
                f"{output}: a run has asked for {other} since, so {self.directory.name} is complete and not "
                "published; run the same command again to publish it"
            )
        self.remove_partial()
        # Snakemake takes the time of a directory from this file. An old version is as new as its link.
        (self.directory / ".snakemake_timestamp").touch()
        link = partial(output)
        link.unlink(missing_ok=True)
        output.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(self._seen_from(output), target_is_directory=True)
        link.replace(output)

    def _seen_from(self, output: Path) -> str:
        return os.path.relpath(self.directory, output.parent)


def _asked(output: Path) -> Path:
    """The file that names the version that a run asked for last."""
    return output.with_name(f".{output.name}.asked")


def check_place(output: Path) -> None:
    """`UserError` where a directory is in the way of a link that is to be published."""
    if output.is_dir() and not output.is_symlink():
        raise UserError(f"{output} is a directory, not a link to a version; move it away and run again")


def published(output: Path) -> Version:
    """The version that a link leads to, whether it is there or not."""
    return Version(output.resolve())


def versions(root: Path) -> list[Version]:
    """All versions below `<root>/versions`."""
    found = (root / "versions").glob("[!.]*")  # a hidden one is being deleted
    return [Version(path) for path in found if path.is_dir() and not path.is_symlink()]
