"""Weights & Biases: a view of a training's metrics and of the lineage records on disk.

A training is one run, named after its version: what continues a training continues its run. The run uses the
artifacts that lead to the training, and makes its checkpoint. It is opened in a process of its own
(`follow`), which the training does not wait for.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from snaketron.files import no_room
from snaketron.jobs.lines import read_metrics
from snaketron.jobs.version import Version
from snaketron.lineage.record import directory_name, read
from snaketron.log import logger
from snaketron.tracking import artifacts
from snaketron.tracking.artifacts import Artifact
from snaketron.tracking.sinks import Run

PROJECT = "snaketron"
OPEN_S = 30  # for W&B to answer at the start of a run
TAKE_S = 30  # for W&B to take what is left at the end of a run
SHORTEST_WAIT_S = 0.001  # between two alerts of one title; 0 would be a minute
ROOM = 1 << 20  # bytes; a disk with less room is full


class WandB:
    """The W&B run of a training.

    Where the server cannot be reached or refuses the key, the run is kept offline.
    """

    name = "W&B"

    def __init__(self, run: Run) -> None:
        self.of = run
        self.client = Client(run.mode, run.upload)
        for base in artifacts.trainings(run.inputs):
            self._log_untracked(base)
        self.run = self.client.open(run.name, run.stage, run.config)
        logger.info("%s: W&B: %s", run.stage, self.client.where(self.run))
        self._list(self._use)

    def log(self, line: Mapping[str, Any]) -> None:
        log(self.run, line)

    def alert(self, title: str, text: str, *, failed: bool) -> None:
        self.run.alert(title[:63], text, "ERROR" if failed else "WARN", SHORTEST_WAIT_S)

    def finish(self, outcome: str | None) -> None:
        if outcome == "finished":
            self._list(self._make)
        elif outcome in ("stopped", "requeued", "time limit"):
            self.run.mark_preempting()  # W&B calls a run so that goes on later
        try:
            self.run.finish(exit_code=0 if outcome == "finished" else 1)
        except TimeoutError:
            logger.warning(
                "%s: W&B has not taken all within %d s; send it with %s",
                self.of.stage,
                TAKE_S,
                _sync(self.run),
            )
        if lacking := no_room(Path(self.run.dir).parent, ROOM):
            logger.warning(
                "%s: W&B: %s: %s; what it has of this run may lack the last steps, and metrics.jsonl has all",
                self.of.stage,
                _place(self.run),
                lacking,
            )

    def _use(self) -> None:
        for artifact in artifacts.leading_to(self.of.inputs, self.of.stage.replace("/", "_")):
            self.client.use(self.run, artifact)

    def _make(self) -> None:
        self.client.make(self.run, artifacts.model(self.of.directory))

    def _list(self, action: Callable[[], None]) -> None:
        """Log artifacts; where that fails, since data were moved, say, metrics are logged all the same."""
        try:
            action()
        except Exception as error:
            logger.warning("%s: W&B: no artifacts: %s: %s", self.of.stage, type(error).__name__, error)

    def _log_untracked(self, version: Version) -> None:
        """Log the training of a checkpoint that this one starts from, unless it was logged from here."""
        record = read(version.record)
        name = directory_name(record.version)
        if self.client.has_logged(name):
            return
        for base in artifacts.trainings(record.inputs):
            self._log_untracked(base)
        told = version.describe()
        run = self.client.open(name, record.name, {"settings": told.settings, "run": told.run})
        for line in read_metrics(version.metrics)[0]:
            log(run, line)
        for artifact in artifacts.leading_to(record.inputs, record.name.replace("/", "_")):
            self.client.use(run, artifact)
        self.client.make(run, artifacts.model(version.directory))
        with contextlib.suppress(TimeoutError):
            run.finish()


class Client:
    """wandb, set to print nothing, and to send no facts about this machine, its user or the code."""

    def __init__(self, mode: str, upload: Sequence[str]) -> None:
        """`upload` has the kinds of artifacts whose files are sent."""
        self.upload = upload
        self.directory = Path(os.environ.get("WANDB_DIR", ""), "wandb").absolute()
        # Artifacts wait here for `wandb sync`, and not in the home directory.
        os.environ.setdefault("WANDB_DATA_DIR", str(self.directory / "data"))
        os.environ.setdefault("WANDB_CACHE_DIR", str(self.directory / "cache"))
        os.environ["WANDB_SILENT"] = "true"
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # wandb's own measurements
        import wandb  # takes 1 s

        self.wandb, self.mode = wandb, mode
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            self._stay_offline("there is no API key: set WANDB_API_KEY, or configure tracking: offline")

    def _settings(self) -> Any:
        return self.wandb.Settings(
            mode=self.mode,  # type: ignore[arg-type]
            root_dir=str(self.directory.parent),
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            run_group=os.environ.get("WANDB_RUN_GROUP", Path.cwd().name),
            resume="allow" if self.mode == "online" else None,
            console="off",
            silent=True,
            host="",
            disable_code=True,
            disable_git=True,
            save_code=False,
            init_timeout=OPEN_S,
            finish_timeout=0 if self.upload else TAKE_S,  # 0: as long as `follow` lets it
            finish_timeout_raises=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )

    def _stay_offline(self, why: str) -> None:
        self.mode = "offline"
        logger.warning("W&B: %s; runs are kept offline", why)

    def open(self, name: str, stage: str, config: dict[str, Any]) -> Any:
        """Open or continue a run; offline where the server does not take it."""

        def init() -> Any:
            return self.wandb.init(
                id=name,
                name=name,
                job_type=stage.partition("/")[0],
                config=config,
                settings=self._settings(),
                reinit="create_new",
            )

        if self.mode == "online":
            try:
                return init()
            except self.wandb.Error as error:
                self._stay_offline(f"the server does not take runs ({' '.join(str(error).split())})")
                self.wandb.teardown()  # or the name would be in use
        return init()

    def where(self, run: Any) -> str:
        """Where a run is, for a person."""
        if self.mode == "online":
            return str(run.url)
        return f"kept in {_place(run)}; send it with {_sync(run)}"

    def has_logged(self, name: str) -> bool:
        prefix = "offline-run" if self.mode == "offline" else "run"
        return any(self.directory.glob(f"{prefix}-*-{name}"))

    def use(self, run: Any, artifact: Artifact) -> None:
        # `run.use_artifact` does this with a new artifact. Offline it refuses to (wandb 0.31), although
        # `wandb sync` would log the artifact just the same.
        run._log_artifact(
            self._listed(artifact), aliases=[artifact.identity], is_user_created=True, use_after_commit=True
        )

    def make(self, run: Any, artifact: Artifact) -> None:
        run.log_artifact(self._listed(artifact), aliases=["latest", artifact.identity])

    def _listed(self, artifact: Artifact) -> Any:
        """An artifact that names its files with their hashes; it holds them where that is asked for.

        `add_reference` would read them again to hash them, or take the address for the hash.
        """
        from wandb.sdk.artifacts.artifact_manifest_entry import ArtifactManifestEntry
        from wandb.sdk.lib.paths import LogicalPath

        listed = self.wandb.Artifact(artifact.name, artifact.kind, metadata=artifact.metadata)
        for name, entry in artifact.files.items():
            if artifact.kind in self.upload and entry.file.is_file():
                # The file itself is sent, also by a later `wandb sync`, and no copy of it is made here.
                listed.add_file(str(entry.file.absolute()), name, skip_cache=True, policy="immutable")
                continue
            address = entry.file.absolute().as_uri()
            digest = entry.sha256 or entry.revision or address
            listed.manifest.add_entry(
                ArtifactManifestEntry(
                    path=LogicalPath(name), digest=digest, ref=address, size=entry.bytes or None
                )
            )
        return listed


def log(run: Any, line: Mapping[str, Any]) -> None:
    """Log a line of metrics, unless a run that W&B resumed has it."""
    if line["iteration"] >= max(run.step, run.starting_step):
        timing = {key: value for key, value in line.get("timing", {}).items() if key != "warnings"}
        values = dict(line) | ({"timing": timing} if timing else {})
        run.log({key: value for key, value in values.items() if key not in UNLOGGED}, step=line["iteration"])


UNLOGGED = ("iteration", "warnings")


def _place(run: Any) -> str:
    """The directory of a run, as it is called from here."""
    return os.path.relpath(Path(run.dir).parent)


def _sync(run: Any) -> str:
    return f"`wandb sync {_place(run)}`"
