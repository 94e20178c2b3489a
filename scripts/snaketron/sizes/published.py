"""Numbers that were measured or published, and what this package works out for the same.

They show how far an estimate can be trusted; a test holds each to its tolerance.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from snaketron.config import Config, Pretrain
from snaketron.sizes.flops import training_flops
from snaketron.sizes.gpus import GPUS
from snaketron.sizes.measured import CARD, HERE, TABLE, Point, points
from snaketron.sizes.memory import peak_bytes
from snaketron.sizes.parameters import num_active_parameters, num_parameters
from snaketron.sizes.speed import MEASURED
from snaketron.sizes.step import step_time, tokens_per_second

_REPORT = "NVIDIA's report"


class Compared(NamedTuple):
    """A published number beside the estimate."""

    what: str
    unit: str
    published: float
    estimate: float
    source: str
    tolerance: float  # relative; the number as it was published has as many digits


def compare(config: Config, nano: Config) -> list[Compared]:
    """The comparison, with config/super.yaml and config/nano.yaml."""
    measured = points(config.model, nano.model)
    return [
        *_sizes(config),
        *_steps(config.pretrain),
        *_operations(config),
        *_speeds(measured),
        *_memory(measured),
    ]


def _sizes(config: Config) -> list[Compared]:
    model, vocab_size = config.model, config.tokenizer.vocab_size
    alone = model.model_copy(update={"mtp_num_layers": 0})
    biases = 41 * model.num_moe_experts  # of routers, one of multi-token prediction's; they are not trained
    return [
        Compared(
            *("tensors of the checkpoint, without biases of routers", "parameters", 123_611_033_088 - biases),
            *(num_parameters(model, vocab_size).total, CARD, 0.0),
        ),
        Compared(
            "parameters without multi-token prediction",
            "parameters",
            120.6e9,
            num_parameters(alone, vocab_size).total,
            _REPORT,
            1e-3,
        ),
        Compared(
            "active parameters",
            "parameters",
            12.7e9,
            num_active_parameters(model, vocab_size),
            _REPORT,
            6e-3,
        ),
    ]


def _steps(pretrain: Pretrain) -> list[Compared]:
    batch, length = pretrain.global_batch_size, pretrain.seq_length
    tokens = batch * length
    steps = {phase.name: pretrain.steps(phase)[0] for phase in pretrain.phases}
    turns = sum(number for name, number in steps.items() if name.startswith("mixed"))
    counts = {
        "steps of 25 T tokens": (993_404, steps["broad"] + steps["focused"]),
        "step at 20 T tokens": (794_723, steps["broad"]),
        "steps of warm-up": (7_949, pretrain.warmup_tokens / tokens),
        "steps of decay": (198_682, pretrain.decay_tokens / tokens),
        "steps of 34 B tokens at 1M, 16 sequences": (2_027, steps["long_1m"]),
        "steps of 17 B tokens at 1M and 4K": (1_014, turns),
    }
    return [Compared(what, "steps", *both, "the recipe", 2e-3) for what, both in counts.items()]


def _operations(config: Config) -> list[Compared]:
    """FLOPs, and the step of the run that was verified: 4,096 tokens, 1,280 sequences, 64 H100s."""
    model, vocab_size = config.model, config.tokenizer.vocab_size
    flops = training_flops(model, vocab_size, 4096)
    seconds = 1280 * 4096 * flops / (64 * MEASURED["h100"].tflops * 1e12)
    return [
        Compared("FLOP a token at 4K", "FLOP", 236.33e12 / 2789, flops, CARD, 2e-3),
        Compared(
            *("FLOP a token at 8K", "FLOP", 248.6e12 / 2969),
            *(training_flops(model, vocab_size, 8192), TABLE, 0.03),
        ),
        Compared("seconds a step at the measured TFLOP/s", "s", 29.369, seconds, CARD, 2e-3),
    ]


def _speeds(points: Iterable[Point]) -> list[Compared]:
    """By the terms of `sizes.step`."""
    return [
        Compared(
            f"{point.gpu}, {point.what}",
            "tokens/s",
            point.tokens_per_second,
            tokens_per_second(point.work, step_time(point.work, GPUS[point.gpu])),
            point.source,
            0.1 if point.source == HERE else 0.2,  # others ran programs that are slower on one GPU
        )
        for point in points
        if point.tokens_per_second
    ]


def _memory(points: Iterable[Point]) -> list[Compared]:
    return [
        Compared(
            f"{point.gpu}, {point.what}: memory",
            "GiB",
            point.peak_gib,
            peak_bytes(point.work) / 2**30,
            point.source,
            0.2 if point.source == CARD else 0.06,
        )
        for point in points
        if point.peak_gib
    ]
