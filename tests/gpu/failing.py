"""One process of two that do not end well: DIRECTORY of their failures, and HOW.

memory: the GPU of the second has too little memory for what it asks for, while the first waits for it.
wait: the first waits in NCCL for the second, which never comes.
disk: the disk is full when the first completes a checkpoint that both have written.
writer: the process that writes a checkpoint for the second is killed.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path
from unittest import mock

from snaketron.config import Parallel
from snaketron.jobs import launch
from snaketron.log import run
from snaketron.model import backend
from snaketron.model.build import build_model
from snaketron.model.checkpoint import Saver
from snaketron.model.distributed import distributed
from snaketron.settings.training import RunSettings
from tests.gpu.worker import VOCABULARY, fixed
from tests.unit.train.test_failed_saves import WRITES, die, no_space

import torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync


def compute(directory: Path, how: str) -> None:
    settings = RunSettings(tracking="off", parallel=Parallel(data_parallel_size=2))
    with distributed(1, settings):
        numbers = torch.ones(1 << 20, device=backend.device())
        torch.distributed.all_reduce(numbers)
        torch.cuda.synchronize()
        if launch.rank() == 1:
            if how == "memory":
                torch.empty(1 << 45, dtype=torch.uint8, device=backend.device())
            time.sleep(600)
        (directory / "waits").touch()
        torch.distributed.all_reduce(numbers)
        torch.cuda.synchronize()


def save(directory: Path, how: str) -> None:
    settings, run_as, _ = fixed({"precision": "bf16"}, {"parallel": {"data_parallel_size": 2}}, {})
    rank, name, fails = {"disk": (0, "finish", no_space), "writer": (1, WRITES, die)}[how]
    with distributed(1, run_as):
        model, saver = build_model(settings, run_as, VOCABULARY).model, Saver.configured(run_as)
        there = mock.patch.object(FileSystemWriterAsync, name, fails)
        with there if launch.rank() == rank else contextlib.nullcontext():
            saver.save(directory / "version", 1, model, None, {"iteration": 1})
            saver.finish()


def main() -> int:
    directory, how = Path(sys.argv[1]), sys.argv[2]
    launch.join()
    with launch.telling(directory):
        (compute if how in ("memory", "wait") else save)(directory, how)
    return 0


if __name__ == "__main__":
    run(main)
