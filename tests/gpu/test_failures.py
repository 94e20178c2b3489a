"""Processes that fail, are stopped or are killed on GPUs, while others wait for them."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from snaketron.jobs import places
from snaketron.jobs.launch import STOP, _free_port, first_failure
from tests.conftest import REPOSITORY
from tests.gpu.test_training import names_of_gpus
from tests.seats import shared
from tests.unit.jobs.test_supervisor import wait_for

import torch


@contextlib.contextmanager
def two(directory: Path, how: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two processes of `tests.gpu.failing`, which are killed at the end, as their supervisor does."""
    names = names_of_gpus()[: min(2, torch.cuda.device_count())]
    common = {"CUDA_VISIBLE_DEVICES": ",".join(names), "MASTER_ADDR": "localhost", "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"} | shared(2, len(names))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.failing", str(directory), how],
            cwd=REPOSITORY,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_a_process_without_memory_says_so_and_ends_while_another_waits_for_it(tmp_path: Path):
    """It waited in NCCL for the other one, until `step_timeout`, and said nothing."""
    with two(tmp_path, "memory") as ranks:
        assert ranks[1].wait(timeout=120) == 1
        said = first_failure(tmp_path)
        assert said and said["rank"] == 1 and "OutOfMemoryError: CUDA out of memory" in said["traceback"]
        assert said["error"].startswith("OutOfMemory: a GPU has too little memory")
        assert ranks[0].poll() is None


def test_a_process_that_waits_for_another_one_says_where_it_is_and_is_ended_by_a_signal(tmp_path: Path):
    """A handler of Python's would run when NCCL returns, and the other one never comes."""
    with two(tmp_path, "wait") as ranks:
        wait_for(lambda: (tmp_path / "waits").exists() or ranks[0].poll() is not None)
        time.sleep(2)
        for rank in ranks:
            rank.send_signal(places.ASK)
        wait_for(lambda: len(places.read(tmp_path)) == 2, seconds=30)
        where = [place.at for place in places.read(tmp_path)]
        assert where == ["run (log.py, synchronize)", "run (log.py, compute)"]
        ranks[0].send_signal(STOP)
        assert ranks[0].wait(timeout=60) == -STOP


def test_a_disk_that_is_full_when_all_have_written_is_told_at_once(tmp_path: Path):
    """By the first process, for whose word the other one waits."""
    with two(tmp_path, "disk") as ranks:
        assert ranks[0].wait(timeout=180) == 1
        said = first_failure(tmp_path)
        assert said and said["rank"] == 0 and said["by_user"]
        assert "iter_0000001: the checkpoint cannot be written (no space left)" in said["error"]


def test_a_process_that_is_killed_while_it_writes_is_named(tmp_path: Path):
    """The killed writer belonged to the second process. The first process, too, says that the writer died."""
    with two(tmp_path, "writer") as ranks:
        assert ranks[0].wait(timeout=180) == 1
        said = first_failure(tmp_path)
        assert said and said["error"].endswith("that writes it was killed by SIGKILL (out of memory?)")


def test_the_memory_of_a_killed_process_is_free_although_another_one_wrote_for_it(tmp_path: Path):
    """That one has the GPU open, too. The next attempt begins as soon as the killed process is gone.

    The process has a quarter of the GPU, so that what others take meanwhile does not count.
    """
    before, whole = torch.cuda.mem_get_info(0)
    held = whole // 4
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": names_of_gpus()[0]}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.gpu.killed", str(tmp_path), str(held)], cwd=REPOSITORY, env=environment
    )
    try:
        wait_for(lambda: (tmp_path / "writes").exists() or process.poll() is not None)
        assert torch.cuda.mem_get_info(0)[0] < before - held // 2
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: torch.cuda.mem_get_info(0)[0] > before - held // 2, seconds=30)
