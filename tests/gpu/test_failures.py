"""Processes that fail on GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from snaketron.jobs.launch import _free_port, first_failure
from tests.conftest import REPOSITORY
from tests.gpu.test_training import names_of_gpus
from tests.seats import shared
from tests.unit.jobs.test_supervisor import wait_for

import torch


def test_a_process_without_memory_says_so_and_ends_while_another_waits_for_it(tmp_path: Path):
    """It waited in NCCL for the other one, until `step_timeout`, and said nothing."""
    names = names_of_gpus()[: min(2, torch.cuda.device_count())]
    common = {"CUDA_VISIBLE_DEVICES": ",".join(names), "MASTER_ADDR": "localhost", "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"} | shared(2, len(names))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.failing", str(tmp_path)],
            cwd=REPOSITORY,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        assert ranks[1].wait(timeout=120) == 1
        said = first_failure(tmp_path)
        assert said and said["rank"] == 1 and "OutOfMemoryError: CUDA out of memory" in said["traceback"]
        assert said["error"].startswith("OutOfMemory: a GPU has too little memory")
        assert ranks[0].poll() is None  # its supervisor kills it
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_the_memory_of_a_killed_process_is_free_although_another_one_wrote_for_it(tmp_path: Path):
    """That one has the GPU open, too. The next attempt begins as soon as the killed process is gone."""
    before = torch.cuda.mem_get_info(0)[0]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": names_of_gpus()[0]}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.gpu.killed", str(tmp_path)], cwd=REPOSITORY, env=environment
    )
    try:
        wait_for(lambda: (tmp_path / "writes").exists() or process.poll() is not None)
        assert torch.cuda.mem_get_info(0)[0] < before - (1 << 33)
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: torch.cuda.mem_get_info(0)[0] > before - (1 << 30), seconds=30)
