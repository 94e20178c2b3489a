"""The smallest change of a layout with which a training fits its GPUs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from snaketron.config import Config, Parallel, Pretrain, Training
from snaketron.config.training_checks import check_training
from snaketron.sizes.plan import Estimate, estimate, memory_of

MAX_DOUBLINGS = 4


def smallest_change(config: Config, training: Training) -> tuple[str, Estimate] | None:
    """The change that lets a training fit `cluster.gpu_memory_gb`, and its size then; None where none does.

    Changes that need no further GPU come first, then those that recompute less, then those of fewer keys.
    """
    limit = config.cluster.gpu_memory_gb
    if limit is None:
        return None
    for update in _updates(training):
        changed = replace(training, run=training.run.model_copy(update=update))
        if changed.run.parallel.tensor_model_parallel_size > max(1, config.cluster.gpus_per_node):
            continue  # it exchanges activations in every layer: too much between nodes
        if check_training(changed, config):
            continue
        if memory_of(config, changed).total <= limit * 1e9:
            return _said(training, update), estimate(config, changed)
    return None


def no_change(training: Training) -> str:
    """What to say where no change lets a training fit."""
    optimizer = training.run.optimizer
    fp32 = [key for key in ("gradient_precision", "moment_precision") if getattr(optimizer, key) == "fp32"]
    bf16 = f"lower {' and '.join(fp32)} of {training.at('optimizer')} to bf16, or " if fp32 else ""
    return f"no layout of up to {2**MAX_DOUBLINGS} times as many GPUs fits; {bf16}take GPUs with more memory"


def _updates(training: Training) -> Iterator[dict[str, Any]]:
    """First no recordings; then layouts by once, twice, ... the GPUs, each with less and more recomputation.

    Each is tried with smaller micro-batches too: first all of them in the layout that there is, then single
    sequences in every layout.
    """
    run, own = training.run, training.run.parallel
    if isinstance(run, Pretrain) and run.cuda_graphs:
        yield {"cuda_graphs": None}
    again: list[dict[str, Any]] = [{}]
    if not run.recompute:
        again.append({"recompute": ["scan"]})
    if not {"moe", "layer"} & set(run.recompute):
        named = [module for module in run.recompute if module != "scan"]
        again.append({"recompute": [*named, "moe"]})
    if "layer" not in run.recompute:
        again.append({"recompute": ["layer"]})
    halves = [
        {"micro_batch_size": run.micro_batch_size >> n} for n in range(1, run.micro_batch_size.bit_length())
    ]
    for more in range(MAX_DOUBLINGS + 1):
        for recompute in again:
            if not more:
                yield from ({**recompute, **half} for half in ({}, *halves) if recompute or half)
            for parallel in _layouts(own, more):
                if parallel != own:
                    yield from ({**recompute, "parallel": parallel, **half} for half in ({}, *halves[-1:]))


def _layouts(parallel: Parallel, more: int) -> Iterator[Parallel]:
    """Layouts of 2^`more` times as many GPUs: few changes first, and expert parallelism before the others."""
    free = ("expert_model_parallel_size",)  # divides the processes that there are
    taking = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    powers = range(MAX_DOUBLINGS + 1)
    choices = sorted(itertools.product(powers, repeat=4), key=lambda choice: (sum(choice), choice[::-1]))
    for expert, *others in choices:
        copies = parallel.data_parallel_size * 2**more
        if copies % 2 ** sum(others):
            continue
        sizes: dict[str, Any] = {
            free[0]: parallel.expert_model_parallel_size * 2**expert,
            **{name: getattr(parallel, name) * 2**n for name, n in zip(taking, others, strict=True)},
            "data_parallel_size": copies // 2 ** sum(others),
        }
        yield parallel.model_copy(update=sizes)
        if sizes["pipeline_model_parallel_size"] > 1 and parallel.pipeline_split == "time":
            yield parallel.model_copy(update=sizes | {"pipeline_split": "layers"})


def _said(training: Training, update: Mapping[str, Any]) -> str:
    """A change in the words of the configuration."""
    parts = []
    if "cuda_graphs" in update:
        parts.append(f"{training.at('cuda_graphs')}: null, which records where there is room")
    if parallel := update.get("parallel"):
        before = training.run.parallel
        parts += [
            f"{key} {getattr(before, key)} -> {getattr(parallel, key)}"
            for key in Parallel.model_fields
            if getattr(before, key) != getattr(parallel, key)
        ]
        parts = [f"{training.at('parallel')}: {', '.join(parts)}"]
    if "micro_batch_size" in update:
        parts.append(f"{training.at('micro_batch_size')}: {update['micro_batch_size']}")
    if "recompute" in update:
        parts.append(f"{training.at('recompute')}: [{', '.join(update['recompute'])}]")
    return "; ".join(parts)
