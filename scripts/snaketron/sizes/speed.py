"""How fast a training is: as stated or estimated, and what others measured on GPUs of that name."""

from __future__ import annotations

from typing import NamedTuple

from snaketron.config import Config, Training
from snaketron.sizes.flops import training_flops
from snaketron.sizes.gpus import of_cluster
from snaketron.sizes.recording import work
from snaketron.sizes.step import step_time, tokens_per_second


class Measured(NamedTuple):
    """A measured speed of a training of hybrid experts, without recomputation of whole layers."""

    tflops: float  # model FLOPs of a GPU in a second, 10^12
    where: str


# Megatron Bridge's own measurements. The H200 is an exception: no training on several nodes is published.
MEASURED = {
    "h100": Measured(236.3, "Super in bf16 on 64 H100, TP 1 PP 2 EP 32, 4K, real data and routing"),
    "h200": Measured(542.0, "a slice of Super in bf16 on one H200, 4K, no exchange: an upper bound"),
    "b200": Measured(542.0, "Super in MXFP8 on 64 B200, balanced routing"),
    "gb200": Measured(600.0, "Super in MXFP8 on 64 GB200, TP 2 EP 64, balanced routing"),
    "gb300": Measured(864.0, "Super in NVFP4 on 64 GB300, EP 64, balanced routing"),
}


ESTIMATED = "estimated"


class Speed(NamedTuple):
    """Tokens that a process trains on in a second, and where the number is from."""

    tokens_per_second: float
    source: str


def flops_per_token(config: Config, training: Training) -> float:
    """Model FLOPs of training on one token, whose weights are frozen where it trains adapters."""
    frozen = training.adapters is not None
    return training_flops(training.model, config.tokenizer.vocab_size, training.seq_length, frozen=frozen)


def speed(config: Config, training: Training) -> Speed | None:
    """The stated throughput of a training, else that of its estimated step; None where neither is known."""
    if stated := training.run.tokens_per_second_per_gpu:
        return Speed(stated, "stated")
    if (gpu := of_cluster(config.cluster)) is None:
        return None
    does = work(config, training)
    return Speed(tokens_per_second(does, step_time(does, gpu)), ESTIMATED)


def published(config: Config, training: Training) -> Speed | None:
    """What a training would do at the speed that others measured on its GPU, in a layout of their own.

    Layers that are computed again cost a forward pass more, a third of the model FLOPs of a full training.
    """
    if config.cluster.gpu is None or not config.cluster.gpus_per_node:
        return None
    measured, flops = MEASURED[config.cluster.gpu], flops_per_token(config, training)
    if "layer" in training.run.recompute:
        flops += training_flops(training.model, config.tokenizer.vocab_size, training.seq_length) / 3
    tokens = measured.tflops * 1e12 / flops
    return Speed(tokens, f"{measured.tflops:g} TFLOP/s as {measured.where}")
