"""One of two processes that load a checkpoint and save it from their layout.

python -m tests.unit.model.saved_layouts BASE OUTPUT '{"tensor_model_parallel_size": 2}'
"""

import json
import sys
from pathlib import Path

import snaketron.model  # noqa: F401  before megatron
from snaketron.config import Parallel, load
from snaketron.model.build import build_model
from snaketron.model.checkpoint import Saver
from snaketron.model.distributed import distributed
from snaketron.settings.training import RunSettings, train_settings
from tests.unit.huggingface.checkpoints import MODEL, TOKENS


def main(base: Path, output: Path, sizes: dict[str, int]) -> None:
    settings = train_settings(load({"model": MODEL.model_dump()}, {}), "sft")
    run = RunSettings(tracking="off", parallel=Parallel(**sizes), cpus_per_task=1)
    with distributed(1, run):
        built = build_model(settings, run, TOKENS, draw=False)
        built.load_base(base)
        Saver.configured(RunSettings(tracking="off")).save(output, 1, built.base, None, {"iteration": 1})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
