"""Weights & Biases: a view of a training's metrics and of the lineage records on disk.

Each group of records that belong together (the shards of a corpus, a blend, a checkpoint) is one artifact
of those record files, made by one run that uses the artifacts its inputs came from. Weights and data stay
where they are: the records name them with their hashes. Runs and artifacts are named by content, so what
was logged before is not logged again.

wandb is imported when tracking is on only (1 s). Nothing here stops a training: after the first failure,
one warning, it goes on without W&B.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snaketron.files import sha256_of, to_json
from snaketron.lineage.record import Entry, Record, read
from snaketron.lineage.walk import record_of
from snaketron.log import logger

import orjson
import yaml

PROJECT = "snaketron"
CHECKPOINT_FILES = ("record.json", "metrics.jsonl", "config.yaml")
TIMEOUT_S = 60  # for W&B to answer, at the start and at the end of a run
RECORD_WAIT_S = 3600  # for the first rank to hash a checkpoint of terabytes, on the rank that writes metrics


@dataclass
class Group:
    """Records that are one artifact, made by one run; or, as `raw`, files that no record tells of."""

    kind: str
    name: str
    files: dict[str, bytes] = field(default_factory=dict)
    inputs: list[Entry] = field(default_factory=list)

    @property
    def title(self) -> str:
        name = self.name.replace("/", "_")
        return name if name.startswith(self.kind) else f"{self.kind}-{name}"

    @property
    def identity(self) -> str:
        """Hash of the files, as 12 hexadecimal digits."""
        return sha256_of({name: hashlib.sha256(text).hexdigest() for name, text in self.files.items()})[:12]


def groups(inputs: Iterable[Entry], consumer: str) -> list[Group]:
    """The groups of the artifacts that `consumer` lists as its inputs."""
    found: dict[tuple[str, str], Group] = {}
    raw: dict[str, Any] = {}
    for entry in inputs:
        made = record_of(entry)
        if made is None:
            raw[entry.path] = entry.reference
            continue
        path, record = made
        if record.kind == "checkpoint":
            found[record.kind, record.name] = checkpoint_group(path.parent, record)
            continue
        name = record.name.partition("/")[0]  # the corpus or source of a shard
        group = found.setdefault((record.kind, name), Group(record.kind, name))
        if path.name not in group.files:
            group.files[path.name] = path.read_bytes()
            group.inputs += record.inputs
    if raw:
        files = {"files.json": to_json([raw[path] for path in sorted(raw)])}
        found["raw", consumer] = Group("raw", consumer, files)
    return list(found.values())


def checkpoint_group(directory: Path, record: Record) -> Group:
    files = {name: (directory / name).read_bytes() for name in CHECKPOINT_FILES}
    return Group("checkpoint", record.name, files, list(record.inputs))


class Client:
    """wandb, set to print nothing, and to send no facts about this machine, its user or the code."""

    def __init__(self, mode: str) -> None:
        self.directory = Path(os.environ.get("WANDB_DIR", ""), "wandb").absolute()
        # Artifacts wait here for `wandb sync`, and not in the home directory.
        os.environ.setdefault("WANDB_DATA_DIR", str(self.directory / "data"))
        os.environ.setdefault("WANDB_CACHE_DIR", str(self.directory / "cache"))
        import wandb

        self.wandb, self.mode = wandb, mode
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no API key; set WANDB_API_KEY, or configure tracking: offline")
        self.settings = wandb.Settings(
            mode=mode,  # type: ignore[arg-type]
            root_dir=str(self.directory.parent),
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            resume="allow" if mode == "online" else None,
            console="off",
            silent=True,
            host="",
            disable_code=True,
            disable_git=True,
            save_code=False,
            init_timeout=TIMEOUT_S,
            finish_timeout=TIMEOUT_S,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )

    def artifact(self, group: Group) -> Any:
        artifact = self.wandb.Artifact(group.title, group.kind)
        for name, text in group.files.items():
            with artifact.new_file(name, "wb") as file:
                file.write(text)
        return artifact

    def open(self, name: str, job_type: str, group: Group, config: dict[str, Any] | None = None) -> Any:
        """Open a run that makes `group` and uses the groups of its inputs.

        The runs that made those groups are logged first.
        """
        used = groups(group.inputs, group.title)
        for other in used:
            self.ensure(other)
        run = self.wandb.init(
            id=name, name=name, job_type=job_type, config=config, settings=self.settings, reinit="create_new"
        )
        for other in used:
            # `run.use_artifact` does this with a new artifact. Offline it refuses to (wandb 0.31), although
            # `wandb sync` would log the artifact just the same.
            run._log_artifact(
                self.artifact(other), aliases=[other.identity], is_user_created=True, use_after_commit=True
            )
        return run

    def close(self, run: Any, group: Group) -> None:
        """Log what a run made, and end it."""
        run.log_artifact(self.artifact(group), aliases=["latest", group.identity])
        run.finish()

    def ensure(self, group: Group) -> None:
        """Log the run that made a group, unless it was logged before."""
        trained = group.kind == "checkpoint"
        name = training_name(group) if trained else f"{group.title}-{group.identity}"
        prefix = "offline-run" if self.mode == "offline" else "run"
        if group.kind == "raw" or any(self.directory.glob(f"{prefix}-*-{name}")):
            return
        if trained:
            values = yaml.safe_load(group.files["config.yaml"])
            run = self.open(name, job_type(group.name), group, {k: values[k] for k in ("settings", "run")})
            for line in group.files["metrics.jsonl"].splitlines():
                log(run, orjson.loads(line))
        else:
            run = self.open(name, group.kind, group)
        self.close(run, group)


def training_name(group: Group) -> str:
    """Name and id of the run of a training: its stage and version key, as those of its directory."""
    return f"{group.name.replace('/', '_')}-{orjson.loads(group.files['record.json'])['key']}"


def job_type(stage: str) -> str:
    return stage.partition("/")[0]


def log(run: Any, line: Mapping[str, Any]) -> None:
    """Log a line of metrics, unless a run that W&B resumed has it."""
    if line["iteration"] >= run.step:
        run.log({key: value for key, value in line.items() if key != "iteration"}, step=line["iteration"])


class Tracker:
    """The W&B run of one training, open while it trains; with `mode` off, it does nothing.

    A process that ends without `finish` leaves a failed run, which the next attempt continues.
    """

    def __init__(
        self,
        mode: str,
        directory: Path,
        stage: str,
        inputs: Sequence[Entry],
        config: dict[str, Any],
    ) -> None:
        self.directory, self.is_on = directory, mode != "off"

        def start() -> None:
            self.client = Client(mode)
            group = Group("checkpoint", stage, inputs=list(inputs))
            self.run = self.client.open(directory.name, job_type(stage), group, config)

        self._try(start)

    def log(self, line: Mapping[str, Any]) -> None:
        """Log a line of metrics.jsonl."""
        self._try(lambda: log(self.run, line))

    def finish(self) -> None:
        """Log the checkpoint when its record says that it is complete, and end the run."""

        def end() -> None:
            waiting_until = time.monotonic() + RECORD_WAIT_S
            while not (self.directory / "record.json").exists() and time.monotonic() < waiting_until:
                time.sleep(1)
            record = read(self.directory / "record.json")
            self.client.close(self.run, checkpoint_group(self.directory, record))

        self._try(end)

    def _try(self, action: Callable[[], None]) -> None:
        if not self.is_on:
            return
        try:
            action()
        except Exception as error:
            self.is_on = False
            logger.warning(
                "W&B: %s: %s; the training goes on without it, and its files are complete",
                type(error).__name__,
                error,
            )
