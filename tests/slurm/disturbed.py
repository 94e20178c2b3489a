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


def state_of(process: psutil.Process) -> str:
    """The state in psutil's words; a process that has ended is dead, whoever waits for it."""
    try:
        state = process.status()
    except psutil.NoSuchProcess:
        return psutil.STATUS_DEAD
    return psutil.STATUS_DEAD if state == psutil.STATUS_ZOMBIE else state


class Disturbed:
    """A copy of the main job that tunes its model again, on two nodes."""

    def __init__(self, slurm: Slurm, workspace: Workspace) -> None:
        self.slurm, self.workspace = slurm, workspace
        self.published = workspace.path / "ckpt/sft"
        self.undisturbed = workspace.path / "undisturbed"
        self.version = self.published.resolve()
        self.version.rename(self.undisturbed)
        self.published.unlink()
        self.started: dict[int, list[psutil.Process]] = {}  # processes by attempt

    @contextlib.contextmanager
    def start(self, config: tuple[str, ...] = (), *arguments: str) -> Iterator[Running]:
        """Begin to tune; at the end nothing of it is left."""
        with self.slurm.start(self.workspace, "ckpt/sft", *arguments, config=config) as self.running:
            yield self.running

    def has_done(self, step: int) -> bool:
        """Whether the current attempt is at this step, by its metrics: a heartbeat comes once a second.

        An attempt first removes the heartbeat of the one before, and the lines of metrics that it will write
        again before its own first heartbeat.
        """
        with contextlib.suppress(OSError):
            lines = (self.version / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
            return (self.version / "progress.json").exists() and any(
                json.loads(line)["iteration"] >= step for line in lines
            )
        return False

    def wait_for(self, step: int, attempt: int = 1) -> list[psutil.Process]:
        """Wait until an attempt has done a step, before Snakemake ends; its processes, by rank.

        They are looked for while they start, so that a fast training is not over when it is to be disturbed.
        """

        def lives[T](found: T) -> T:
            assert self.running.process.poll() is None, self.running.log.read_text()[-3000:]
            return found

        def started() -> bool:
            earlier = [one for n, ranks in self.started.items() if n != attempt for one in ranks]
            self.started[attempt] = [one for one in self.ranks() if one not in earlier]
            return len(self.started[attempt]) == 2

        wait_for(lambda: lives(self.begun >= attempt and started()), 600, every=0.5)
        wait_for(lambda: lives(self.has_done(step)), 600, every=0.01)
        return self.started[attempt]

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
    def begun(self) -> int:
        """How many attempts have begun."""
        return len(self.attempts) if (self.version / "attempts.json").exists() else 0

    @property
    def outcomes(self) -> list[str | None]:
        return [attempt["outcome"] for attempt in self.attempts]

    def ranks(self) -> list[psutil.Process]:
        """The processes of the training, by rank."""
        found: dict[int, psutil.Process] = {}
        psutil.process_iter.cache_clear()  # else a number that began again may be that of a process of before
        everyone = sorted(
            psutil.process_iter(["create_time"]), key=lambda process: process.info["create_time"]
        )
        for process in reversed(everyone):
            with contextlib.suppress(psutil.Error):
                command = process.cmdline()
                if "scripts/sft.py" in command and "python" in Path(command[0]).name:
                    environment = process.environ()
                    if TOKEN in environment and process.cwd() == str(self.workspace.path):
                        # The oldest: others are its children, which write checkpoints, and have a lower
                        # number where numbers began again.
                        found[int(environment["SLURM_PROCID"])] = process
        return [found[rank] for rank in sorted(found)]

    @contextlib.contextmanager
    def suspended(self, *ranks: int, step: int, attempt: int = 1) -> Iterator[list[psutil.Process]]:
        """Processes that do not go on for a while, from when an attempt has done a step."""
        all_of_them = self.wait_for(step, attempt)
        processes = [all_of_them[rank] for rank in ranks]
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
