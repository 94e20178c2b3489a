"""The starts of a training and how each ended: what decides whether it is started once more."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from snaketron.files import read_json, write_json
from snaketron.jobs import heartbeat
from snaketron.jobs.owner import is_owned
from snaketron.jobs.version import Version
from snaketron.log import UserError
from snaketron.wording import after

Outcome = Literal["finished", "stopped", "requeued", "time limit", "failed", "hung"]


@dataclass
class Attempt:
    """A start of a training's processes."""

    started: str = ""  # ISO 8601, UTC
    job: str | None = None  # of Slurm
    from_iteration: int = 0
    iteration: int = 0  # at its end, as far as its supervisor knows
    outcome: Outcome | None = None  # None: it runs, or ended without a word
    error: str | None = None
    seconds: float | None = None  # None until it has ended
    gave_up: str | None = None  # why only a person may ask for another one

    @property
    def has_failed(self) -> bool:
        return self.outcome in ("failed", "hung")


def read_attempts(path: Path) -> list[Attempt]:
    """The attempts in a file, oldest first; none where there is no file.

    Raises `UserError` where it holds something else.
    """
    try:
        return [Attempt(**one) for one in read_json(path)]
    except FileNotFoundError:
        return []
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a list of attempts ({error}); delete it and run again") from None


def state_of(version: Version, attempts: Sequence[Attempt]) -> tuple[str, str]:
    """The state of a training by its version, and in words why it is not finished.

    It is finished, running, waiting (for its next job), failed or stopped.
    """
    if version.is_finished:
        return "finished", ""
    if is_owned(version):
        beat = heartbeat.read(version.heartbeat)
        return "running", heartbeat.sentence(beat).replace("  ", ", ") if beat else "it is being started"
    last = attempts[-1] if attempts else Attempt()
    when = after(last.iteration)
    if last.gave_up:
        return "failed", last.gave_up
    if last.has_failed:
        return "failed", f"{last.error or last.outcome} ({when})"
    if last.outcome in ("requeued", "time limit"):
        return "waiting", f"waits for its next job, {when}"
    if last.outcome == "stopped":
        return "stopped", f"somebody stopped it {when}"
    step = version.latest_iteration()
    goes_on = f"continues {after(step)}" if step else "begins anew"
    return "stopped", f"it ended without a word: killed, or its machine was lost. It {goes_on}"


class Attempts:
    """The attempts at a version, oldest first, in its file `path`.

    An attempt without an outcome ended without a word: its node was lost or pre-empted, or its supervisor was
    killed.
    """

    def __init__(self, name: str, path: Path, max_restarts: int) -> None:
        self.name, self.path, self.max_restarts = name, path, max_restarts
        self.all = read_attempts(path)

    def begin(self, iteration: int, job: str | None) -> None:
        """Note a start after `iteration` steps."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.all.append(Attempt(now, job, from_iteration=iteration, iteration=iteration))
        self._began = time.monotonic()
        self._write()

    def end(self, outcome: Outcome, iteration: int, error: str | None = None) -> None:
        """Note how the current attempt ended, and after how many steps."""
        last = self.all[-1]
        last.outcome, last.iteration, last.error = outcome, iteration, error
        last.seconds = round(time.monotonic() - self._began, 1)
        self._write()

    def give_up(self, reason: str) -> UserError:
        """Note that only a person may ask for another attempt; the error to raise."""
        self.all[-1].gave_up = reason
        self._write()
        return UserError(f"{self.name}: {reason}")

    @property
    def gave_up(self) -> str | None:
        """Why there is no attempt after the last one; None when there may be."""
        return self.all[-1].gave_up if self.all else None

    def check(self, iteration: int) -> None:
        """`UserError` when the attempts so far forbid another one after `iteration` steps.

        They do when the last two failed in the same way after the same step, or when more than
        `max_restarts` in a row ended without a new checkpoint.
        """
        recent = self._recent()
        failures = [(a.iteration, a.error) for a in recent[:2] if a.has_failed]
        if len(failures) == 2 and failures[0] == failures[1]:
            step, error = failures[0]
            raise self.give_up(f"failed twice in the same way {after(step)}: {error}")
        in_vain = 0
        for attempt in recent:
            if attempt.from_iteration != iteration:
                break
            in_vain += 1
        if in_vain > self.max_restarts:
            last = recent[0]
            missing = f"checkpoint {after(iteration)}" if iteration else "first checkpoint"
            raise self.give_up(
                f"{in_vain} starts in a row ended without a {missing} "
                f"(max_restarts {self.max_restarts}); the last one: "
                f"{last.error or last.outcome or 'it ended without a word (a lost node, or killed)'}"
            )

    def _recent(self) -> list[Attempt]:
        """The attempts since a person last started the training, newest first."""
        recent = []
        for attempt in reversed(self.all):
            if attempt.gave_up or attempt.outcome in ("stopped", "finished"):
                break
            recent.append(attempt)
        return recent

    def _write(self) -> None:
        write_json(self.path, [asdict(attempt) for attempt in self.all])
