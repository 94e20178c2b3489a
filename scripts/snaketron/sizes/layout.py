"""How the processes of a training lie on the nodes of a cluster, and what Slurm is asked for.

The rules that these requests follow, and what the executor plugin makes of them, are in docs/slurm.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from snaketron.config import Cluster, Config, ConfigError, Run
from snaketron.config.linears import check_targets
from snaketron.sizes.memory import memory_of_process, static_of_run
from snaketron.sizes.parameters import pipeline_pattern


class Layout(NamedTuple):
    """How the processes of a training lie on nodes; each node has as many."""

    nodes: int
    tasks_per_node: int
    gpus_per_node: int  # asked for: no more than there are processes


def layout(run: Run, cluster: Cluster) -> Layout:
    """The nodes that a training needs; the configuration was checked to fill them.

    >>> run = Run(parallel=Parallel(tensor_model_parallel_size=4, data_parallel_size=8))
    >>> layout(run, Cluster(gpus_per_node=8))
    Layout(nodes=4, tasks_per_node=8, gpus_per_node=8)
    """
    processes = run.parallel.world_size
    per_node = min(processes, cluster.tasks_per_node or cluster.gpus_per_node or processes)
    return Layout(processes // per_node, per_node, min(per_node, cluster.gpus_per_node))


def check_memory(config: Config, sections: Iterable[str] = ("pretrain", "sft")) -> None:
    """`ConfigError` when a training needs more of a GPU than it has, by `cluster.gpu_memory_gb`."""
    problems, limit = [], config.cluster.gpu_memory_gb or math.inf
    longest = max(config.pretrain.steps(phase)[2] for phase in config.pretrain.phases)
    for section in sections:
        run, vocab_size = getattr(config, section), config.tokenizer.vocab_size
        seq_length = longest if section == "pretrain" else config.sft_data.pack_size
        needed = memory_of_process(config.model, vocab_size, seq_length, run, run.optimizer) / 1e9
        if needed > limit:
            stages = static_of_run(config.model, vocab_size, run, run.optimizer)
            kept = max(stage.total for stage in stages) / 1e9
            problems.append(
                f"{section}.parallel: takes {needed:.4g} GB of a GPU, more than cluster.gpu_memory_gb "
                f"{limit:g}, of which weights, gradients and optimizer take {kept:.4g}; for these raise "
                "expert_model_parallel_size (experts are most of the model), tensor_ or "
                "pipeline_model_parallel_size, or data_parallel_size; for activations, lower "
                "micro_batch_size, raise context_parallel_size, or set recompute"
            )
    if problems:
        raise ConfigError("\n".join(problems))


def check_lora(config: Config) -> None:
    """`ConfigError` when LoRA as it is configured does not fit the model or the GPUs."""
    pattern, lora = config.model.hybrid_layer_pattern, config.lora
    stages = pipeline_pattern(pattern, lora.parallel.pipeline_model_parallel_size).split("|")
    if problems := check_targets("lora.target_modules", lora.target_modules, config.model, stages):
        raise ConfigError("\n".join(problems))
    check_memory(config, ["lora"])


def resources(run: Run, cluster: Cluster) -> dict[str, Any]:
    """The Snakemake resources of a training rule, which the executor plugin turns into an sbatch request.

    On one node it is an ordinary job: one task that has the CPUs and GPUs of all processes, which the trainer
    starts. On several nodes `mpi` makes the plugin run the rule in the batch step, where the trainer calls
    srun with the whole geometry.
    """
    nodes, per_node, gpus = layout(run, cluster)
    asked: dict[str, Any] = {
        "nodes": nodes,
        "cpus_per_task": run.cpus_per_task * (per_node if nodes == 1 else 1),
        "mem_mb": math.ceil(run.mem_gb_per_task * 1000) * per_node,  # of a node
        # Slurm itself requeues the job when a node fails or it is pre-empted, and its log is continued.
        "slurm_extra": "--requeue --open-mode=append",
    }
    if gpus:
        asked["gres"] = f"gpu:{gpus}"  # of each node; `gpu` is of the job, and may be split over nodes
    if nodes > 1:
        asked["mpi"] = "srun"  # its presence counts: "" or None would be one too
        if per_node > 1:
            asked["tasks_per_node"] = per_node
        else:  # which the plugin refuses to ask as tasks_per_node=1
            asked["tasks"] = nodes
            if gpus:
                asked["tasks_per_gpu"] = 0  # else `tasks` is read as those of a GPU: pending for ever
    return asked
