"""Layouts with which a training fits a number of GPUs, the fastest by the estimate of its step first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from snaketron.config import Config, Parallel, Training
from snaketron.config.base import Module
from snaketron.config.cluster import Split
from snaketron.config.training_checks import check_training
from snaketron.sizes.gpus import Gpu, in_nodes
from snaketron.sizes.layout import layout_sizes, layout_words
from snaketron.sizes.memory import peak_bytes
from snaketron.sizes.recording import work
from snaketron.sizes.step import Step, step_time, tokens_per_second
from snaketron.wording import BYTES, large

MICRO_BATCHES = (1, 2, 4)
SPLITS: tuple[Split, ...] = ("time", "layers")
RECOMPUTE: tuple[list[Module], ...] = ([], ["scan"], ["moe"], ["layernorm", "moe", "core_attn"], ["layer"])
SHORT = 32_768  # tokens: shorter sequences are not divided, because whole ones already fit a GPU


class Found(NamedTuple):
    """A layout, what it needs, and its estimated step."""

    parallel: Parallel
    micro_batch_size: int
    recompute: tuple[str, ...]
    peak_bytes: float  # of the fullest GPU
    step: Step
    tokens_per_second: float  # of each GPU


def measure(config: Config, training: Training, gpu: Gpu) -> Found:
    """The layout that a training has, whether or not it fits."""
    run, does = training.run, work(config, training)
    step = step_time(does, gpu)
    return Found(
        parallel=run.parallel,
        micro_batch_size=run.micro_batch_size,
        recompute=tuple(run.recompute),
        peak_bytes=peak_bytes(does),
        step=step,
        tokens_per_second=tokens_per_second(does, step),
    )


def search(config: Config, training: Training, gpu_name: str, num_gpus: int) -> list[Found]:
    """All layouts that fit, the fastest first.

    Tensor parallelism stays within NVLink's reach, and experts are not divided further (expert tensor
    parallelism 1). Micro-batches, recomputation and splits of a pipeline are tried; everything else is as
    configured.
    """
    gpu, on_gpus = in_nodes(gpu_name, config.cluster), _on_gpus(config, gpu_name)
    found = []
    for parallel in _layouts(training, gpu, num_gpus):
        for micro_batch, recompute in itertools.product(_micro_batches(training), RECOMPUTE):
            changed = _changed(training, parallel, micro_batch, recompute)
            if check_training(changed, on_gpus):
                continue
            if peak_bytes(work(on_gpus, changed)) <= gpu.usable_gb * 1e9:
                found.append(measure(on_gpus, changed, gpu))
    return sorted(found, key=lambda one: one.step.total)


def why_none(config: Config, training: Training, gpu_name: str, num_gpus: int) -> str:
    """Why no layout was found: a rule that all of them break, or how much memory they need."""
    gpu, on_gpus = in_nodes(gpu_name, config.cluster), _on_gpus(config, gpu_name)
    problems: list[str] = []
    least: tuple[float, Parallel] | None = None
    for parallel in _layouts(training, gpu, num_gpus):
        # The one that recomputes most first; not every precision recomputes everything.
        tried = [_changed(training, parallel, 1, recompute) for recompute in reversed(RECOMPUTE)]
        wrong = [check_training(changed, on_gpus) for changed in tried]
        if [] in wrong:
            needed = peak_bytes(work(on_gpus, tried[wrong.index([])])), parallel
            least = min(least or needed, needed, key=lambda one: one[0])
        else:
            problems.append("\n".join(wrong[-1]))
    if least is None:  # every layout breaks a rule: told is the one that breaks the fewest
        return min(problems, key=lambda told: told.count("\n"))
    short = training.adapters or training.run.optimizer.gradient_precision == "bf16"
    bf16 = f", or bf16 for gradient_precision and moment_precision of {training.at('optimizer')}"
    return (
        f"The one that needs least, {layout_words(least[1]) or 'one process'}, takes "
        f"{large(least[0], BYTES)} of a GPU, of which {gpu.usable_gb} GB can be used. "
        f"Take more GPUs{'' if short else bf16}."
    )


def _on_gpus(config: Config, gpu_name: str) -> Config:
    """The configuration on nodes of such GPUs; a layout may fill as much of a GPU as a search lets it."""
    gpu, memory = in_nodes(gpu_name, config.cluster), config.cluster.gpu_memory_gb
    if gpu_name != config.cluster.gpu or memory is None or memory > gpu.usable_gb:
        memory = gpu.usable_gb
    cluster = {"gpu": gpu_name, "gpus_per_node": gpu.gpus_per_node, "tasks_per_node": None}
    cluster["gpu_memory_gb"] = memory
    return config.model_copy(update={"cluster": config.cluster.model_copy(update=cluster)})


def _changed(
    training: Training, parallel: Parallel, micro_batch: int, recompute: Sequence[Module]
) -> Training:
    update = {"parallel": parallel, "micro_batch_size": micro_batch, "recompute": list(recompute)}
    return replace(training, run=training.run.model_copy(update=update))


def place(found: Sequence[Found], parallel: Parallel) -> int | None:
    """The place of a layout among those found, from 1: by its sizes alone."""
    layouts = list(dict.fromkeys(layout_sizes(one.parallel) for one in found))
    own = layout_sizes(parallel)
    return layouts.index(own) + 1 if own in layouts else None


def _micro_batches(training: Training) -> tuple[int, ...]:
    return (1,) if training.packed else MICRO_BATCHES


def _layouts(training: Training, gpu: Gpu, num_gpus: int) -> Iterator[Parallel]:
    near = min(gpu.domain, 8)  # more parts than that are too small to keep a GPU busy
    most = min(16, len(training.model.hybrid_layer_pattern), num_gpus)
    stages = [number for number in range(1, most + 1) if num_gpus % number == 0]  # 3 on a rack of 72 GPUs
    contexts = _powers(num_gpus) if training.seq_length > SHORT else [1]
    for tp, pp, cp in itertools.product(_powers(near), stages, contexts):
        if num_gpus % (tp * pp * cp):
            continue
        for ep in _powers(min(num_gpus // pp, training.model.num_moe_experts)):
            for split in SPLITS if pp > 1 else SPLITS[:1]:
                yield Parallel(
                    tensor_model_parallel_size=tp,
                    pipeline_model_parallel_size=pp,
                    pipeline_split=split,
                    context_parallel_size=cp,
                    expert_model_parallel_size=ep,
                    data_parallel_size=num_gpus // (tp * pp * cp),
                )


def _powers(most: int) -> list[int]:
    """Powers of two up to `most`.

    >>> _powers(5)
    [1, 2, 4]
    """
    return [2**n for n in range(most.bit_length())]
