"""The main job, its last training undone, for something to go wrong when two nodes do it again."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from snaketron.files import read_json
from snaketron.jobs.owner import TOKEN
from tests.conftest import Workspace
from tests.end_to_end.test_kill import metrics, weights
from tests.slurm.conftest import Job, Running, Slurm, wait_for

import psutil


class Disturbed:
    """A copy of the main job that tunes its model again, on two nodes."""

    def __init__(self, slurm: Slurm, workspace: Workspace) -> None:
        self.slurm, self.workspace = slurm, workspace
        self.published = workspace.path / "ckpt/sft"
        self.undisturbed = workspace.path / "undisturbed"
        self.version = self.published.resolve()
        self.version.rename(self.undisturbed)
        self.published.unlink()

    @contextlib.contextmanager
    def start(self, config: tuple[str, ...] = (), *arguments: str) -> Iterator[Running]:
        """Begin to tune; at the end nothing of it is left."""
        with self.slurm.start(self.workspace, "ckpt/sft", *arguments, config=config) as self.running:
            yield self.running

    def has_done(self, step: int) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.version / "progress.json").read_text())["iteration"] >= step
        return False

    def wait_for(self, step: int) -> None:
        """Wait until a step is done, which must come before Snakemake ends."""

        def done() -> bool:
            assert self.running.process.poll() is None, self.running.log.read_text()[-3000:]
            return self.has_done(step)

        wait_for(done, 600)

    def pre_empt(self) -> None:
        """Have a job of another partition ask for both nodes, for 2 s; it need not wait for jobs of `low`."""
        self.slurm.call(
            *("sbatch", "--parsable", "-phigh", "-Atests", "-N2", "--exclusive", "--wrap=sleep 2"),
            f"--chdir={self.workspace.path.parent}",
            "--output=/dev/null",
        )

    @property
    def jobs(self) -> list[Job]:
        """Those of this copy, oldest first."""
        return sorted(self.slurm.jobs(self.workspace), key=lambda job: job.id)

    @property
    def job(self) -> Job:
        return self.jobs[-1]

    @property
    def attempts(self) -> list[dict[str, Any]]:
        return read_json(self.version / "attempts.json")

    @property
    def outcomes(self) -> list[str | None]:
        return [attempt["outcome"] for attempt in self.attempts]

    def ranks(self) -> list[psutil.Process]:
        """The processes of the training, by rank."""
        found: dict[int, psutil.Process] = {}
        for process in sorted(psutil.process_iter(), key=lambda process: process.pid, reverse=True):
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if TOKEN in environment and process.cwd() == str(self.workspace.path):
                    command = process.cmdline()
                    if "scripts/sft.py" in command and "python" in Path(command[0]).name:
                        # The first: later ones are its children, which write checkpoints.
                        found[int(environment["SLURM_PROCID"])] = process
        return [found[rank] for rank in sorted(found)]

    @contextlib.contextmanager
    def suspended(self, *ranks: int) -> Iterator[list[psutil.Process]]:
        """Processes that do not go on for a while."""
        processes = [self.ranks()[rank] for rank in ranks]
        for process in processes:
            process.suspend()
        try:
            yield processes
        finally:
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    process.resume()

    def is_undisturbed(self) -> None:
        """What was published is bit for bit what an undisturbed run published."""
        assert weights(self.published) == weights(self.undisturbed)
        assert metrics(self.published) == metrics(self.undisturbed)
        answers = [
            (root / "answers/step_0000010.json").read_text() for root in (self.published, self.undisturbed)
        ]
        assert answers[0] == answers[1]
        assert not list(self.version.glob(".*.partial"))
