"""What Slurm is asked for trainings, by rule, profile or user, is enough for them."""

from __future__ import annotations

from types import SimpleNamespace

from snaketron.config import ConfigError, load
from snaketron.graph.requests import check_requests
from snaketron.sizes.limits import Limits

import pytest
from snakemake.resources import Resources


def workflow(partition: str = "slurm_partition", **resources: dict) -> SimpleNamespace:
    """A workflow whose rules have these resources beside a partition."""
    rules = {
        name: SimpleNamespace(resources=Resources.from_mapping({partition: "gpu"} | resources.get(name, {})))
        for name in ("pretrain", "sft", "lora", "merge_lora")
    }
    return SimpleNamespace(get_rule=rules.__getitem__)


def test_limits_are_numbers_or_not_known():
    asked = workflow(pretrain={"runtime": "4h", "mem": "3GB"}, sft={"runtime": lambda wildcards: 1})
    assert check_requests(asked, load({}, {})) == {
        "pretrain/broad": Limits(240, 3000),
        "pretrain/focused": Limits(240, 3000),
        "sft": Limits(),
        "lora": Limits(),
        "lora_merged": Limits(),
    }


@pytest.mark.parametrize(
    ("asked", "limits"),
    [
        ({"mem_mb": 0, "runtime": 0}, Limits()),
        ({"mem_mb": 0, "mem_mb_per_cpu": 16000, "cpus_per_task": 12}, Limits(mem_mb=192_000, cpus=12)),
        ({"mem_mb": 4000, "mem_mb_per_cpu": 500, "cpus_per_task": 12}, Limits(mem_mb=6000, cpus=12)),
        (
            {"mem_mb_per_cpu": 500, "cpus_per_task": 12, "tasks_per_node": 8, "nodes": 2},
            Limits(mem_mb=48_000, cpus=96),
        ),
        ({"mem_mb": 4000, "mem_mb_per_cpu": 0, "cpus_per_task": 12}, Limits(mem_mb=4000)),
        ({"mem_mb": 4000, "mem_mb_per_cpu": 500}, Limits()),
        ({"mem_mb": 4000, "mem_mb_per_cpu": 500, "cpus_per_task": -1}, Limits()),
        ({"mem_mb": 4000, "mem_mb_per_cpu": lambda wildcards: 500, "cpus_per_task": 12}, Limits()),
        ({"mem_mb_per_cpu": 500, "cpus_per_task": 12, "tasks_per_node": lambda wildcards: 8}, Limits()),
    ],
)
def test_memory_is_read_as_the_executor_plugin_reads_it(asked: dict, limits: Limits):
    """0 asks for nothing, and memory of a CPU, times those of all tasks, comes before that of a node."""
    assert check_requests(workflow(lora=asked), load({}, {}))["lora"] == limits


def test_two_phases_of_one_problem_are_told_once():
    with pytest.raises(ConfigError) as error:
        check_requests(workflow(pretrain={"runtime": 1}, sft={"mem_mb": 1}), load({}, {}))
    starts = [line.split(" ")[0] for line in str(error.value).splitlines()]
    assert starts == ["pretrain.stop_before_limit", "set-resources"]


def test_what_is_trained_on_request_is_checked_then():
    assert check_requests(workflow(lora={"runtime": 1}), load({}, {}))["lora"] == Limits(1)


def test_what_slurm_does_not_run_has_no_limits():
    assert check_requests(workflow("queue", sft={"runtime": 1}), load({}, {})) == {}
