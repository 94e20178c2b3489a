"""One process of two, of which the second fails while the first waits for it: DIRECTORY of their failures.

Its GPU has too little memory for what it asks for.
"""

from __future__ import annotations

import sys
from pathlib import Path

from snaketron.config import Parallel
from snaketron.jobs import launch
from snaketron.log import run
from snaketron.model import backend
from snaketron.model.distributed import distributed
from snaketron.settings.training import RunSettings

import torch


def main() -> int:
    settings = RunSettings(tracking="off", parallel=Parallel(data_parallel_size=2))
    with launch.telling(Path(sys.argv[1])), distributed(1, settings):
        numbers = torch.ones(1 << 20, device=backend.device())
        torch.distributed.all_reduce(numbers)
        torch.cuda.synchronize()
        if launch.rank() == 1:
            torch.empty(1 << 45, dtype=torch.uint8, device=backend.device())
        torch.distributed.all_reduce(numbers)
        torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    run(main)
