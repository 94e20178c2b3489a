"""Whether the jobs of trainings get the time and the memory that the trainings need."""

from __future__ import annotations

from dataclasses import dataclass

from snaketron.config import Config, Training
from snaketron.sizes.layout import layout, node_memory_mb
from snaketron.sizes.plan import estimate, merged_bytes
from snaketron.wording import BYTES, large

PROGRAMS = 1e9  # bytes that a process needs beside its tensors: its libraries, and what they keep


@dataclass(frozen=True)
class Limits:
    """What Slurm is asked for each job of a rule; None where it is not known before the job."""

    minutes: float | None = None
    mem_mb: float | None = None  # of a node, in units of 2^20 bytes, as sbatch counts
    cpus: float | None = None  # of a node, if memory is asked for each of them


def check_limits(config: Config, training: Training, limits: Limits, *, merges: bool = False) -> list[str]:
    """Problems of the time limit and of the memory; none where they are not known.

    Args:
        merges: whether the job adds the adapters of the training to their base, and writes the whole model.
    """
    if merges:
        return _check_memory(config, training, limits, merges=True)
    return [*_check_time(training, limits.minutes), *_check_memory(config, training, limits)]


def _check_time(training: Training, minutes: float | None) -> list[str]:
    stop = training.run.stop_before_limit
    if minutes is None or stop < minutes * 60:
        return []
    return [
        f"{training.at('stop_before_limit')} {stop} (seconds) is not less than the time limit of its job, "
        f"runtime {minutes:g} (minutes), so {training.section} would stop before its first step; lower it, "
        f"or raise runtime of {training.section} in set-resources of the profile"
    ]


def _check_memory(config: Config, training: Training, limits: Limits, *, merges: bool = False) -> list[str]:
    run, mem_mb, per_node = training.run, limits.mem_mb, layout(training.run, config.cluster).tasks_per_node
    rule, needed = training.section, estimate(config, training).host_bytes
    if merges:
        rule = f"merge_{training.section}"
        if config.cluster.gpus_per_node:
            needed = merged_bytes(config, training)
    if mem_mb is None or (needed + PROGRAMS) * per_node <= mem_mb * 2**20:
        return []
    if limits.cpus:
        asked = (
            f"set-resources {rule}: mem_mb_per_cpu {mem_mb / limits.cpus:g} of each of "
            f"{limits.cpus:g} CPUs of a node with {per_node} processes"
        )
    elif mem_mb == node_memory_mb(run, per_node):
        asked = f"{training.at('mem_gb_per_task')} {run.mem_gb_per_task:g}"
    else:
        asked = f"set-resources {rule}: mem_mb {mem_mb:g} of a node with {per_node} processes"
    on_gpus = config.cluster.gpus_per_node > 0
    what = "the copy of a checkpoint" if on_gpus else "tensors"
    if on_gpus and run.offload_optimizer and not merges:
        what += " and the optimizer's offloaded state"
    return [
        f"{asked}: a process of {rule} needs {large(needed, BYTES)} for {what} by the estimate "
        f"of the dry-run, and about {PROGRAMS / 1e9:g} GB for programs; give more"
    ]
