"""What is asked for a training, and what the executor plugin makes of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from snaketron.config import ConfigError, load
from snaketron.executor.request import sbatch_options
from snaketron.sizes.layout import layout, resources

import pytest


class Resources(dict):
    """Snakemake's: a mapping with attributes."""

    __getattr__ = dict.__getitem__


def job(asked: dict[str, Any]) -> Any:
    return SimpleNamespace(resources=Resources(asked | {"slurm_partition": "gpu", "runtime": 240}), threads=1)


def request(parallel: dict[str, int], cluster: dict[str, Any], **keys: Any) -> str:
    """The sbatch options of pretraining."""
    pretrain = {"parallel": parallel, "global_batch_size": 64, "micro_batch_size": 1, **keys}
    config = load({"pretrain": pretrain, "cluster": cluster}, {})
    submitted = job(resources(config.pretrain, config.cluster))
    return sbatch_options(submitted)


START = "-p gpu --open-mode=append -t 240"


@pytest.mark.parametrize(
    ("parallel", "cluster", "expected"),
    [
        ({}, {}, "--mem 4000 --nodes=1 --requeue --ntasks=1 --cpus-per-task=1"),
        ({}, {"gpus_per_node": 8}, "--mem 4000 --nodes=1 --requeue --cpus-per-task=1 --gres=gpu:1"),
        (  # of one node: one task, with the CPUs of all
            {"data_parallel_size": 8},
            {"gpus_per_node": 8},
            "--mem 32000 --nodes=1 --requeue --cpus-per-task=8 --gres=gpu:8",
        ),
        (
            {"tensor_model_parallel_size": 2, "data_parallel_size": 16},
            {"gpus_per_node": 8},
            "--mem 32000 --nodes=4 --requeue --ntasks-per-node=8 --cpus-per-task=1 --gres=gpu:8",
        ),
        (  # tasks_per_node=1 is refused by the plugin, and `tasks` alone would become --ntasks-per-gpu
            {"data_parallel_size": 2},
            {"gpus_per_node": 1},
            "--mem 4000 --nodes=2 --requeue --ntasks=2 --cpus-per-task=1 --gres=gpu:1",
        ),
        (
            {"data_parallel_size": 2},
            {"tasks_per_node": 1},
            "--mem 4000 --nodes=2 --requeue --ntasks=2 --cpus-per-task=1",
        ),
    ],
)
def test_the_request_of_a_training(parallel, cluster, expected):
    assert request(parallel, cluster) == f"{START} {expected}"


def test_memory_and_cpus_are_of_the_processes_of_a_node():
    asked = request({"data_parallel_size": 4}, {"gpus_per_node": 2}, cpus_per_task=6, mem_gb_per_task=1.5)
    assert "--mem 3000 --nodes=2 --requeue --ntasks-per-node=2 --cpus-per-task=6 " in asked


@pytest.mark.parametrize(
    ("cluster", "parallel", "message"),
    [
        (
            {"gpus_per_node": 8},
            {"data_parallel_size": 16, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1},
            None,
        ),
        (
            {"gpus_per_node": 6},
            {"data_parallel_size": 8},
            "pretrain.parallel: 8 processes do not fill nodes of cluster.gpus_per_node 6; 6 or 12 would",
        ),
        (
            {"tasks_per_node": 3},
            {"data_parallel_size": 4},
            "pretrain.parallel: 4 processes do not fill nodes of cluster.tasks_per_node 3; 3 or 6 would",
        ),
        (
            {"gpus_per_node": 8, "tasks_per_node": 4},
            {},
            "cluster.tasks_per_node 4 beside cluster.gpus_per_node 8: each GPU has one process, so leave out "
            "tasks_per_node; to use fewer GPUs of a node, lower gpus_per_node",
        ),
    ],
)
def test_processes_fill_their_nodes(cluster, parallel, message):
    pretrain = {"parallel": parallel, "global_batch_size": 64, "micro_batch_size": 1}
    if message is None:
        load({"pretrain": pretrain, "cluster": cluster}, {})
        return
    with pytest.raises(ConfigError) as error:
        load({"pretrain": pretrain, "cluster": cluster}, {})
    assert message in str(error.value).splitlines()


@pytest.mark.parametrize(
    ("parallel", "cluster", "expected"),
    [
        ({}, {}, (1, 1, 0)),
        ({"data_parallel_size": 2}, {}, (1, 2, 0)),
        ({}, {"gpus_per_node": 8}, (1, 1, 1)),
        ({"tensor_model_parallel_size": 4, "data_parallel_size": 8}, {"gpus_per_node": 8}, (4, 8, 8)),
        ({"data_parallel_size": 4}, {"gpus_per_node": 2}, (2, 2, 2)),
        ({"data_parallel_size": 2}, {"tasks_per_node": 1}, (2, 1, 0)),
    ],
)
def test_the_layout_follows_from_the_parallel_sizes(parallel, cluster, expected):
    pretrain = {"parallel": parallel, "global_batch_size": 64, "micro_batch_size": 1}
    model = {"num_query_groups": 4, "mamba_num_groups": 4}
    config = load({"pretrain": pretrain, "cluster": cluster, "model": model}, {})
    assert layout(config.pretrain, config.cluster) == expected
