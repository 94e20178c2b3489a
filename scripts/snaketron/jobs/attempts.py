"""The starts of a training and how each ended: what decides whether it is started once more."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from snaketron.files import read_json, write_json
from snaketron.log import UserError

Outcome = Literal["finished", "stopped", "requeued", "time limit", "failed", "hung"]


class Attempts:
    """The attempts at a version, oldest first, in its file `path`.

    An attempt without an outcome ended without a word: its node was lost or pre-empted, or its supervisor was
    killed.
    """

    def __init__(self, name: str, path: Path, max_restarts: int) -> None:
        self.name, self.path, self.max_restarts = name, path, max_restarts
        self.all: list[dict[str, Any]] = read_json(path) if path.exists() else []

    def begin(self, iteration: int, job: str | None) -> None:
        """Note a start after `iteration` steps."""
        self.all.append(
            {
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
                "job": job,
                "from_iteration": iteration,
                "iteration": iteration,
                "outcome": None,
                "error": None,
            }
        )
        self._began = time.monotonic()
        write_json(self.path, self.all)

    def end(self, outcome: Outcome, iteration: int, error: str | None = None) -> None:
        """Note how the current attempt ended, and after how many steps."""
        seconds = round(time.monotonic() - self._began, 1)
        self.all[-1] |= {"outcome": outcome, "iteration": iteration, "error": error, "seconds": seconds}
        write_json(self.path, self.all)

    def give_up(self, reason: str) -> UserError:
        """Note that only a person may ask for another attempt; the error to raise."""
        self.all[-1]["gave_up"] = reason
        write_json(self.path, self.all)
        return UserError(f"{self.name}: {reason}")

    @property
    def gave_up(self) -> str | None:
        """Why there is no attempt after the last one; None when there may be."""
        return self.all[-1].get("gave_up") if self.all else None

    def check(self, iteration: int) -> None:
        """`UserError` when the attempts so far forbid another one after `iteration` steps.

        They do when the last two failed in the same way after the same step, or when more than
        `max_restarts` in a row ended without a new checkpoint.
        """
        recent = self._recent()
        failures = [(a["iteration"], a["error"]) for a in recent[:2] if a["outcome"] in ("failed", "hung")]
        if len(failures) == 2 and failures[0] == failures[1]:
            raise self.give_up(f"failed twice in the same way after step {failures[0][0]}: {failures[0][1]}")
        in_vain = 0
        for attempt in recent:
            if attempt["from_iteration"] != iteration:
                break
            in_vain += 1
        if in_vain > self.max_restarts:
            last = recent[0]
            raise self.give_up(
                f"{in_vain} starts in a row ended without a checkpoint after step {iteration} "
                f"(max_restarts {self.max_restarts}); the last one: "
                f"{last['error'] or last['outcome'] or 'it ended without a word (a lost node, or killed)'}"
            )

    def _recent(self) -> list[dict[str, Any]]:
        """The attempts since a person last started the training, newest first."""
        recent = []
        for attempt in reversed(self.all):
            if attempt.get("gave_up") or attempt["outcome"] in ("stopped", "finished"):
                break
            recent.append(attempt)
        return recent
