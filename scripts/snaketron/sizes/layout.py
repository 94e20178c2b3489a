"""How the processes of a training lie on the nodes of a cluster, and what Slurm is asked for.

The rules that these requests follow, and what the executor plugin makes of them, are in docs/slurm.md.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from snaketron.config import Cluster, Model, Parallel, Run
from snaketron.config.base import FLEXIBLE, Dispatcher

SHORT_NAMES = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "CP": "context_parallel_size",
    "EP": "expert_model_parallel_size",
    "ETP": "expert_tensor_parallel_size",
    "DP": "data_parallel_size",
}


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


def dispatcher(model: Model, run: Run, cluster: Cluster) -> Dispatcher:
    """What takes tokens to the experts of other processes, where the configuration leaves it to the program.

    By alltoall a token travels once for each of its experts that are elsewhere, and by allgather once to each
    process that shares experts: where a token has as many experts as processes, that is less.

    >>> run = Run(parallel=Parallel(expert_model_parallel_size=8, data_parallel_size=8))
    >>> [dispatcher(Model(moe_router_topk=experts), run, Cluster(gpus_per_node=8)) for experts in (6, 22)]
    ['alltoall', 'allgather']
    """
    asked, sizes = run.moe_token_dispatcher, run.parallel
    group = sizes.expert_model_parallel_size
    if asked in FLEXIBLE:
        return asked
    if group == 1 or asked == "alltoall":
        return "alltoall"
    on_a_node = layout(run, cluster).tasks_per_node % group == 0
    less = group <= model.moe_router_topk and on_a_node
    plain = sizes.expert_tensor_parallel_size == 1 and not run.moe_shared_expert_overlap
    return "allgather" if asked or (less and plain) else "alltoall"


def layout_words(parallel: Parallel) -> str:
    """Parallel sizes in short, without those of 1.

    >>> layout_words(Parallel(tensor_model_parallel_size=4, data_parallel_size=8))
    'TP 4, DP 8'
    >>> layout_words(Parallel(pipeline_model_parallel_size=2, pipeline_split="layers"))
    'PP 2 by layers'
    """
    by = {"PP": " by layers"} if parallel.pipeline_split == "layers" else {}
    sizes = zip(SHORT_NAMES, layout_sizes(parallel), strict=True)
    return ", ".join(f"{name} {size}{by.get(name, '')}" for name, size in sizes if size > 1)


def layout_sizes(parallel: Parallel) -> tuple[int, ...]:
    """Parallel sizes, in the order of `SHORT_NAMES`."""
    return tuple(getattr(parallel, key) for key in SHORT_NAMES.values())


def node_memory_mb(run: Run, tasks_per_node: int) -> int:
    """The memory of a node that a training asks for."""
    return math.ceil(run.mem_gb_per_task * 1000) * tasks_per_node


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
        "mem_mb": node_memory_mb(run, per_node),
    }
    if gpus:
        # `gres` counts GPUs of each node; `gpu` those of the job, which may be split unevenly.
        asked["gres"] = f"gpu:{gpus}"
    if nodes > 1:
        asked["mpi"] = "srun"  # to the plugin, "" or None would be a request for MPI too
        if per_node > 1:
            asked["tasks_per_node"] = per_node
        else:  # one task a node; the plugin refuses tasks_per_node=1
            asked["tasks"] = nodes
            if gpus:
                asked["tasks_per_gpu"] = 0  # else `tasks` is read as those of a GPU: pending for ever
    return asked
