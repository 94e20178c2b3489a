"""A process with BYTES of a GPU, and one that writes for it: both wait to be killed. DIRECTORY says when."""

from __future__ import annotations

import multiprocessing
import sys
import time
from pathlib import Path

from snaketron.model import backend
from snaketron.model.checkpoint import _write

import torch


def main(directory: Path, held_bytes: int) -> None:
    held = torch.empty(held_bytes, dtype=torch.uint8, device=backend.device())
    torch.cuda.synchronize()
    multiprocessing.get_context("fork").Process(target=_write, args=(time.sleep, 600)).start()
    (directory / "writes").touch()
    time.sleep(600)
    del held


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
