"""One process of those that answer together: on CPUs or GPUs, in any layout, with the weights of a new model.

    torchrun ... -m tests.gpu.answers '{"precision": "fp32", "parallel": {"expert_model_parallel_size": 2}}'

The last rank prints, as a line of JSON, the answers to `PROMPTS` and the scores of those with two tokens or
more, in nats.
"""

from __future__ import annotations

import json
import sys

import snaketron.model  # noqa: F401  before megatron
from snaketron.config import load
from snaketron.inference.generate import generate
from snaketron.inference.score import score
from snaketron.jobs.launch import is_writer
from snaketron.model.build import BuiltModel, build_model
from snaketron.model.distributed import distributed
from snaketron.settings.training import RunSettings, TrainSettings, run_settings, train_settings
from tests.unit.sizes.models import SMALL

VOCABULARY = 512
PROMPTS = [[5, 6, 7], [8], list(range(9, 40)), [5, 6]]


def settings(precision: str, parallel: dict[str, int]) -> tuple[TrainSettings, RunSettings]:
    sft = {"parallel": parallel, "global_batch_size": 2}
    model = {"precision": precision, "mamba_num_heads": 16, "mamba_head_dim": 16}  # as fp8 wants them
    config = load({"model": SMALL | model, "sft": sft}, {})
    return train_settings(config, "sft"), run_settings(config, "sft")


def found(model: BuiltModel) -> dict[str, list[list[float]]]:
    """What the processes of a model answer, and how likely they find the prompts."""
    scores = score(model, [prompt for prompt in PROMPTS if len(prompt) > 1])
    answers = generate(model, PROMPTS, stop=[], max_tokens=8, batch_size=3)
    return {"answers": answers, "nats": [one.nats.tolist() for one in scores]}


def main(precision: str, parallel: dict[str, int]) -> None:
    values, run = settings(precision, parallel)
    with distributed(1, run):
        result = found(build_model(values, run, VOCABULARY))
        if is_writer():
            print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
