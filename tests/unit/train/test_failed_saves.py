"""A checkpoint that one of two processes cannot write: both end, and say why in the same words."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import snaketron.model  # noqa: F401  before megatron
from snaketron.config import Parallel
from snaketron.jobs import launch
from snaketron.jobs.version import Version
from snaketron.model.build import build_model
from snaketron.model.checkpoint import Saver, _write
from snaketron.model.distributed import distributed
from snaketron.settings.training import RunSettings, TrainSettings
from tests.ranks import on_ranks

import psutil
import pytest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

WRITES = "write_preloaded_data_multithread"


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def saved(values: TrainSettings, run: RunSettings, directory: Path, rank: int, name: str, how: Any) -> str:
    """What a save ends with whose `name`, a method of megatron-core's writer, does `how` on one rank."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined] # may fork
    with distributed(1, run):
        saver = Saver.configured(run)
        there = mock.patch.object(FileSystemWriterAsync, name, how)
        with there if int(os.environ["RANK"]) == rank else contextlib.nullcontext():
            model = build_model(values, run, 256).model
            try:
                saver.save(directory, 1, model, None, {"iteration": 1})
                saver.finish()
            except Exception as error:
                return f"{type(error).__name__}: {error}"
            return "saved"


@pytest.fixture
def two(settings: Any) -> tuple[TrainSettings, RunSettings]:
    values, run = settings()
    return values, run.model_copy(update={"parallel": Parallel(data_parallel_size=2)})


def test_a_process_that_is_killed_while_it_writes_is_named_by_all(two: Any, tmp_path: Path):
    """As where the memory of a node does not suffice. The first rank alone knows what failed elsewhere."""
    values, run = two
    background = run.model_copy(update={"save_in_background": True})
    found = on_ranks(2, saved, values, background, tmp_path, 1, WRITES, die)
    said = "the process that writes it was killed by SIGKILL (out of memory?)"
    expected = f"RuntimeError: {tmp_path}/iter_0000001: the checkpoint cannot be written: {said}"
    assert found == [expected] * 2
    assert Version(tmp_path).iterations() == [] and list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_is_full_when_all_have_written_is_told_at_once(
    two: Any, tmp_path: Path, background: bool
):
    """The first rank writes what the others have written, who wait for it, and not for its next words."""
    values, run = two
    run = run.model_copy(update={"save_in_background": background})
    found = on_ranks(2, saved, values, run, tmp_path, 0, "finish", no_space)
    assert found[0].startswith(f"UserError: {tmp_path}/iter_0000001: the checkpoint cannot be written (no sp")
    assert found[1] != "saved"  # gloo says that the other one is gone; beside NCCL this one is killed
    assert Version(tmp_path).iterations() == [] and list(tmp_path.glob(".*")) == []


def _train_and_write(values: TrainSettings, run: RunSettings, directory: Path) -> None:
    with distributed(1, run):
        saver = Saver.configured(run)
        with mock.patch.object(FileSystemWriterAsync, WRITES, lambda *_: time.sleep(600)):
            saver.save(directory, 1, build_model(values, run, 256).model, None, {"iteration": 1})
        (directory / "writes").touch()
        saver.finish()


def _write_late(directory: Path) -> None:
    """Start a process that writes, which has its first instant when this one is gone."""

    def late(number: signal.Signals, tell: Any = launch.die_with_parent) -> None:
        while not (directory / "killed").exists():
            time.sleep(0.02)
        tell(number)

    with mock.patch.object(launch, "die_with_parent", late):
        multiprocessing.get_context("fork").Process(target=_write, args=(time.sleep, 600)).start()
    (directory / "writes").touch()
    time.sleep(600)


@pytest.mark.parametrize("late", [False, True])
def test_who_writes_ends_with_the_process_that_trains(settings: Any, tmp_path: Path, late: bool):
    """It would keep a GPU's memory, and write on beside the next attempt."""
    values, run = settings(save_in_background=True)
    trains = multiprocessing.get_context("forkserver").Process(
        target=_write_late if late else _train_and_write,
        args=(tmp_path,) if late else (values, run, tmp_path),
    )
    trains.start()
    try:
        while not (tmp_path / "writes").exists():
            assert trains.is_alive()
            time.sleep(0.02)
        (writes,) = psutil.Process(trains.pid).children()
    finally:
        trains.kill()
        trains.join()
        (tmp_path / "killed").touch()
    gone, _ = psutil.wait_procs([writes], timeout=60)
    assert gone == [writes]
