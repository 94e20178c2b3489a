"""Where the lines of a training's metrics go beside `metrics.jsonl`, which stays the truth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from snaketron.jobs.version import Version
from snaketron.lineage.record import Entry, read

SLOWEST = 10e6  # bytes a second; an upload that is slower is left, for `wandb sync`


@dataclass(frozen=True)
class Run:
    """The training that is followed, as the sinks know it."""

    directory: Path  # of its version
    stage: str
    inputs: list[Entry]
    config: dict[str, Any]  # `settings` and `run`, as in config.yaml
    mode: Literal["off", "offline", "online"] = "off"  # of W&B
    upload: list[str] = field(default_factory=list)  # kinds of W&B artifacts whose files are sent too
    tensorboard: bool = False
    notify: list[str] = field(default_factory=list)  # command that is told of a stall
    attempts: int = 0  # of earlier jobs
    steps: int = 0  # that they told of

    @property
    def version(self) -> Version:
        return Version(self.directory)

    @property
    def name(self) -> str:
        """Name and id of the run: the stage and the version key, as its directory has them."""
        return self.directory.name

    @property
    def upload_s(self) -> float:
        """Seconds that W&B may take for the files of the finished training, at `SLOWEST`."""
        if not self.upload or not self.version.record.exists():
            return 0.0
        return sum(output.bytes for output in read(self.version.record).outputs) / SLOWEST


class Sink(Protocol):
    """Takes what a training reports. What it raises ends this sink, with one warning, and nothing else."""

    name: str

    def log(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl, in order; after a continued training some may come again."""

    def alert(self, title: str, text: str, *, failed: bool) -> None:
        """Something that a person wants to hear of while the training runs."""

    def finish(self, outcome: str | None) -> None:
        """The training has ended: "finished", another outcome of an attempt, or None: not known."""


def numbers(line: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a line under names such as `sources/docs/loss`.

    >>> dict(numbers({"iteration": 2, "loss": 1.5, "sources": {"docs": {"loss": 1.0}}, "warnings": []}))
    {'loss': 1.5, 'sources/docs/loss': 1.0}
    """
    for key, value in line.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{before}{key}/")
        elif isinstance(value, int | float) and key != "iteration":
            yield f"{before}{key}", value
