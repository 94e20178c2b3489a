"""What a training is and what it will take, worked out from the configuration alone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from snaketron.config import Config, Model, Parallel, Training
from snaketron.sizes.memory import Memory, fullest, static_memory, updated_parameters
from snaketron.sizes.parameters import Parameters, num_active_parameters, num_parameters, weight_bytes
from snaketron.sizes.recording import work
from snaketron.sizes.speed import Speed, flops_per_token, published, speed
from snaketron.sizes.stages import adapter_parameters, stage_parameters, trained_parameters


@dataclass(frozen=True)
class Estimate:
    """The size of a training."""

    num_parameters: int  # with multi-token prediction
    num_active_parameters: int  # that a token meets
    num_adapter_parameters: int | None  # None where the model itself is trained
    tokens: int
    memory: Memory  # of the fullest process
    # That a process needs of its node's memory: all tensors without GPUs; with GPUs those that are offloaded,
    # and the copy of a checkpoint while it is written.
    host_bytes: float
    flops: float  # model FLOPs of all tokens
    checkpoint_bytes: float
    speed: Speed | None  # stated or estimated; None where it is not known
    published: Speed | None  # that of others on such a GPU, to compare with
    hours: float | None  # at the first of these speeds
    process_hours: float | None  # of all processes together: GPU hours on GPUs

    def num_jobs(self, limit_hours: float, stop_before_limit: float) -> int | None:
        """In how many jobs the time limit cuts the training; None where it is not known.

        Args:
            limit_hours: time limit of a job.
            stop_before_limit: seconds before it at which a job hands over to the next.
        """
        usable = limit_hours - stop_before_limit / 3600
        return math.ceil(self.hours / usable) if self.hours and usable > 0 else None


def estimate(config: Config, training: Training) -> Estimate:
    """The size of a training of the configuration."""
    model, vocab_size = training.model, config.tokenizer.vocab_size
    adapters, processes = training.adapters, training.run.parallel.world_size
    found = speed(config, training)
    hours = hours_at(found, training)
    memory, on_gpus = memory_of(config, training), config.cluster.gpus_per_node > 0
    host = _offloaded_bytes(config, training) + _copied_bytes(config, training) if on_gpus else memory.total
    return Estimate(
        num_parameters=num_parameters(model, vocab_size).total,
        num_active_parameters=num_active_parameters(model, vocab_size),
        num_adapter_parameters=(
            sum(stage.total for stage in adapter_parameters(model, vocab_size, Parallel(), adapters))
            if adapters
            else None
        ),
        tokens=training.tokens,
        memory=memory,
        host_bytes=host,
        flops=training.tokens * flops_per_token(config, training),
        checkpoint_bytes=checkpoint_bytes(config, training),
        speed=found,
        published=published(config, training),
        hours=hours,
        process_hours=hours * processes if hours else None,
    )


def hours_at(found: Speed | None, training: Training) -> float | None:
    """How long a training takes at a speed of each process; None where that is not known."""
    if found is None:
        return None
    return training.tokens / (found.tokens_per_second * training.run.parallel.world_size) / 3600


def memory_of(config: Config, training: Training) -> Memory:
    """What the fullest process holds at its peak, on its GPU or its node."""
    return fullest(work(config, training), on_gpus=config.cluster.gpus_per_node > 0)


def checkpoint_bytes(config: Config, training: Training) -> float:
    """Bytes of a checkpoint, from which the training can continue: weights, main weights and both moments.

    Main weights and moments are fp32 there, whatever they are on the GPU. That of adapters holds them alone.
    Not counted: what describes the tensors, 4 % at 2 million parameters.
    """
    model, vocab_size = training.model, config.tokenizer.vocab_size
    (trained,) = trained_parameters(model, vocab_size, Parallel(), training.adapters)
    return trained.total * _in_checkpoint(model)


def merged_bytes(config: Config, training: Training) -> float:
    """Bytes of the model with merged adapters that the process with most of them copies to the host.

    That checkpoint has no optimizer.
    """
    stages = stage_parameters(training.model, config.tokenizer.vocab_size, training.run.parallel)
    return weight_bytes(training.model) * _of_fullest(stages, training.run.parallel)


def _in_checkpoint(model: Model) -> int:
    """Bytes of a parameter: the weight, its main weight and both moments."""
    return weight_bytes(model) + 3 * 4


def _offloaded_bytes(config: Config, training: Training) -> float:
    """Bytes of the optimizer that the fullest process keeps on the host in place of its GPU."""
    does = work(config, training)
    whole = does._replace(run=training.run.model_copy(update={"offload_optimizer": 0.0}))
    there, here = (max(kept.total for kept in static_memory(one)) for one in (whole, does))
    return there - here


def _copied_bytes(config: Config, training: Training) -> float:
    """Bytes of a checkpoint that the process with most of them copies to the host, to write them."""
    model, vocab_size, parallel = training.model, config.tokenizer.vocab_size, training.run.parallel
    stages = trained_parameters(model, vocab_size, parallel, training.adapters)
    return _in_checkpoint(model) * _of_fullest(stages, parallel)


def _of_fullest(stages: Iterable[Parameters], parallel: Parallel) -> float:
    """How many of the stages' parameters the process with most of them writes."""
    return max(updated_parameters(stage, parallel) for stage in stages)
