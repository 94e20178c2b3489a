"""A signal near a validation: it is given up for the checkpoint, and who continues computes it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import snaketron.model  # noqa: F401  before megatron
from snaketron.config.data import Split
from snaketron.files import sha256
from snaketron.jobs.version import Version
from snaketron.train.batches import Batches, sequences
from snaketron.train.build import build_training
from snaketron.train.loop import Trainer
from snaketron.train.losses import Batch
from snaketron.train.stopping import Stopped

import pytest
import torch

STEPS, VALID = (
    5,
    40,
)  # samples of a validation, in 20 micro-batches, between which a signal is looked for twice


class Random(Batches):
    """Sequences of random tokens, each a function of its number; `read` is told of each micro-batch."""

    def __init__(self, read: Callable[[Split, int], None]) -> None:
        super().__init__(2)
        self.read = read

    def has(self, split: str) -> bool:
        return split != "test"

    def micro_batches(self, split: Split, first: int, count: int) -> Iterator[Batch]:
        for number, batch in enumerate(super().micro_batches(split, first, count)):
            self.read(split, number)
            yield batch

    def collate(self, split: str, indices: Sequence[int]) -> dict:
        tokens = torch.stack(
            [torch.randint(0, 256, (17,), generator=torch.Generator().manual_seed(i)) for i in indices]
        )
        positions = torch.arange(16).expand(len(indices), 16)
        return sequences(tokens[:, :-1], tokens[:, 1:], positions, depths=1)


class Run:
    """A training in a directory, and what it leaves there."""

    def __init__(self, directory: Path, settings: Any) -> None:
        self.directory, self.version = directory, Version(directory)
        values, run = settings()
        changes = {"sample_interval": 2, "eval_interval": 2, "save_interval": 4, "eval_samples": VALID}
        self.settings, self.run = values, run.model_copy(update={"log_interval": 1, **changes})
        self.answered: list[int] = []
        self.validated = 0  # micro-batches

    def train(self, stop: tuple[Split, int, int] | None = None) -> bool:
        """Train to the end, or to a signal at (split, steps, micro-batch); whether it was stopped."""
        torch.manual_seed(1)
        trainer = Trainer(build_training(self.settings, self.run, 256))
        trainer.resume(self.directory)

        def read(split: Split, number: int) -> None:
            self.validated += split == "valid"
            if (split, trainer.iteration, number) == stop:
                os.kill(os.getpid(), signal.SIGUSR1)

        try:
            trainer.train(Random(read), self.directory, lambda: self.answered.append(trainer.iteration))
        except Stopped:
            return True
        return False

    @property
    def lines(self) -> list[dict[str, Any]]:
        lines = map(json.loads, self.version.metrics.read_text().splitlines())
        return [{key: value for key, value in line.items() if key != "timing"} for line in lines]

    @property
    def weights(self) -> list[str]:
        directory = self.version.iteration_directory(STEPS)
        return [sha256(path) for path in sorted(directory.glob("*.distcp"))]


@pytest.fixture
def undisturbed(tmp_path: Path, settings) -> Run:
    run = Run(tmp_path / "undisturbed", settings)
    assert not run.train()
    return run


@pytest.mark.parametrize(
    ("stop", "saved", "validated"),
    [
        (("valid", 0, 3), None, 8),  # before the first step there is nothing to save
        (("train", 1, 1), 2, 20),  # in the step after which a validation is due
        (("valid", 2, 3), 2, 28),
        (("valid", 2, 19), 3, 40),  # in the last part: it ends, and the next step is saved
        (("valid", 5, 9), 5, 76),  # after the last step
    ],
)
def test_a_validation_is_given_up_for_the_checkpoint_and_done_by_who_continues(
    undisturbed: Run, tmp_path: Path, settings, stop: Any, saved: int | None, validated: int
):
    """One that is longer than `stop_before_limit` left no time to save."""
    run = Run(tmp_path / "stopped", settings)
    assert run.train(stop)
    assert (run.version.latest_iteration(), run.validated) == (saved, validated)
    assert not run.train()
    assert run.lines == undisturbed.lines and run.weights == undisturbed.weights
    assert sorted(set(run.answered)) == undisturbed.answered == [0, 2, 4, 5]
