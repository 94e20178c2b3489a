"""How many tokens a second a model answers, and the CPU time of a token.

    python -m tests.benchmarks.decoding [--tokens 400] [--rows 1] [--threads 1] [--profile]
    python -m tests.benchmarks.decoding --model nano --tokens 64 --rows 16  # of gpu_training, on a GPU

The tiny model is that of config/config.yaml. The weights are new, on which the speed does not depend. On a
machine that does other things at the same time the CPU time of a token says more than the tokens a second.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time

import snaketron.model  # noqa: F401  before megatron
from snaketron.config import load
from snaketron.inference.generate import generate
from snaketron.model.build import build_model
from snaketron.model.distributed import distributed
from snaketron.model.lora import freeze
from snaketron.settings.training import RunSettings, train_settings

import torch
from tests.benchmarks import shapes

MODELS = {"tiny": {}, "nano": shapes.NANO, "super": shapes.SUPER}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--rows", type=int, default=1, help="texts that grow at the same time")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true", help="show where the time goes")
    args = parser.parse_args()
    config = load({"model": MODELS[args.model]}, {})
    vocabulary = shapes.VOCABULARY if MODELS[args.model] else config.tokenizer.vocab_size
    run = RunSettings(tracking="off")
    with distributed(0, run):
        torch.set_num_threads(args.threads)
        built = build_model(train_settings(config, "sft"), run, vocabulary)
        freeze(built.model)  # as a checkpoint is opened
        prompts = [[3 + row, 5, 7, 11] for row in range(args.rows)]
        generate(built, prompts, stop=[], max_tokens=20, batch_size=args.rows)  # what is made once
        profile = cProfile.Profile()
        if args.profile:
            profile.enable()
        started, busy = time.perf_counter(), time.process_time()
        generate(built, prompts, stop=[], max_tokens=args.tokens, batch_size=args.rows)
        seconds, cpu = time.perf_counter() - started, time.process_time() - busy
        profile.disable()
    count = args.tokens * args.rows
    print(f"{count / seconds:,.0f} tokens/s; {cpu / count * 1e3:.2f} ms of CPU time a token")
    if args.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(45)


if __name__ == "__main__":
    main()
