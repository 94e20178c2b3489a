"""Average the checkpoints of a phase from before its learning rate falls, in place of a decay.

A step moves the weights by as much as its learning rate says. So the weights that a decay would have given
are, but for what later gradients would have been, a weighted average of those along the way at a steady rate
(Tian et al., "WSM", arXiv 2507.17634). Nemotron 3 Super's base is such an average, over 500 billion tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from snaketron.files import owned, writing_directory
from snaketron.huggingface.torch_dist import Chunk, Reader, is_finite, write
from snaketron.jobs.version import Description, Version, version_key
from snaketron.lineage.record import Entry
from snaketron.log import UserError, logger
from snaketron.settings.schedule import steady_steps
from snaketron.settings.training import settings_of_checkpoint
from snaketron.wording import plural

import torch


def coefficients(iterations: Sequence[int]) -> list[float]:
    """The weight of the checkpoint after each of these steps, in order; they add up to 1.

    The steps between two checkpoints count with the mean that 1 - sqrt(d) has over them, where d goes from 0
    at the first checkpoint to 1 at the last: with means w_1 ... w_k the first weighs 1 - w_1, the others
    w_j - w_(j+1), and the last w_k (theorem 1 of the paper).

    >>> [round(c, 4) for c in coefficients([100, 200])]
    [0.6667, 0.3333]
    """
    span = iterations[-1] - iterations[0]
    shares = [(iteration - iterations[0]) / span for iteration in iterations]
    means = [(_area(b) - _area(a)) / (b - a) for a, b in pairwise(shares)]
    return [before - after for before, after in pairwise([1.0, *means, 0.0])]


def _area(share: float) -> float:
    """Below 1 - sqrt(d), from 0 to a share."""
    return share - share**1.5 * 2 / 3


def average(source: Path, output: Path, *, stage: str, tokens: int | None) -> None:
    """Write the average of the checkpoints of a finished phase, and link `output` to it.

    It lies in a version of its own. One tensor is in memory at a time, in fp32. The average has no optimizer:
    it can be evaluated, exported, and be a base.

    Args:
        source: the phase, such as ckpt/pretrain/broad.
        stage: name of the average below <ckpt>, merged/....
        tokens: over which it is taken, before the rate falls; None: over all checkpoints that are kept.

    Raises:
        UserError: fewer than two such checkpoints are there, or one cannot be read; nothing is published.
    """
    started = time.monotonic()
    phase = Version(source.resolve())
    identity, iterations = phase.identity, _steady(phase, tokens)
    key = version_key({"stage": stage, "iterations": iterations}, [identity])
    version = Version.of(output, stage, key)
    version.directory.mkdir(parents=True, exist_ok=True)
    version.ask(output)
    with owned(version.lock):
        if not version.is_finished:
            entry = Entry("checkpoint", str(source), version=identity)
            _write(version, phase, iterations, stage, entry, started)
    version.publish(output)
    logger.info("%s: %s is %s", stage, output, version.directory)


def _steady(phase: Version, tokens: int | None) -> list[int]:
    """The steps whose checkpoints are averaged."""
    settings = settings_of_checkpoint(phase.describe().settings)
    last = steady_steps(settings.schedule, settings.optimizer, settings.train_iters)
    there = [iteration for iteration in phase.iterations() if 0 < iteration <= last]
    first = there[-1] - tokens / (settings.global_batch_size * settings.seq_length) if there and tokens else 0
    found = [iteration for iteration in there if iteration >= first]
    if len(found) < 2:
        raise UserError(
            f"{phase.directory}: {plural(len(found), 'checkpoint')} to average of the {last:,} steps before "
            "its learning rate falls, and two are needed; train it with a larger keep_steady, which keeps so "
            "many, or raise pretrain.merge_tokens"
        )
    return found


def _write(
    version: Version, phase: Version, iterations: list[int], stage: str, source: Entry, started: float
) -> None:
    """Write the tensors, then what says that they are complete."""
    weights = coefficients(iterations)
    said = ", ".join(f"{n:,} {weight:.4f}" for n, weight in zip(iterations, weights, strict=True))
    logger.info("%s: averaging the checkpoints after steps %s", stage, said)
    with writing_directory(version.iteration_directory(iterations[-1])) as aside:
        readers = [Reader(phase.iteration_directory(iteration)) for iteration in iterations]
        write(aside, _chunks(readers, weights), {"iteration": iterations[-1]})
    trained = phase.describe()
    version.complete(
        Description(trained.settings | {"stage": stage}, [source], trained.tokenizer_sha256),
        phase.tokenizer,
        iterations[-1],
        {"averaged": {str(n): weight for n, weight in zip(iterations, weights, strict=True)}},
        inputs={"checkpoint": source},
        started=started,
    )


def _chunks(readers: Sequence[Reader], weights: Sequence[float]) -> list[Chunk]:
    """Every tensor of the model, made when it is written."""
    last = readers[-1]
    for reader in readers:
        if reader.tensors != last.tensors:
            raise UserError(f"{reader.directory} and {last.directory} do not hold the same tensors")
    return [_chunk(key, readers, weights) for key in last.tensors]


def _chunk(key: str, readers: Sequence[Reader], weights: Sequence[float]) -> Chunk:
    shape, dtype = readers[-1].tensors[key]

    def make() -> torch.Tensor:
        total = torch.zeros(shape, dtype=torch.float32)
        for reader, weight in zip(readers, weights, strict=True):
            total.add_(reader.read(key), alpha=weight)
        if not is_finite(total):
            raise UserError(f"{readers[-1].directory}: the average of {key} is not finite")
        return total.to(dtype)

    return Chunk(key, shape, dtype, None, make)
