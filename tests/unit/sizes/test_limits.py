"""Time limits and memory that a training needs more of."""

from __future__ import annotations

from typing import Any

from snaketron.config import load
from snaketron.sizes.limits import Limits, check_limits
from tests.unit.sizes.models import COUNTED

import pytest

IN_BF16 = COUNTED["model"] | {"precision": "bf16"}


def problems(limits: Limits, name: str = "sft", *, merges: bool = False, **values: Any) -> list[str]:
    config = load(COUNTED | values | {"sft": COUNTED["sft"] | values.get("sft", {})}, {})
    return check_limits(config, config.training(name), limits, merges=merges)


def test_what_is_not_known_is_not_checked():
    assert problems(Limits(), sft={"mem_gb_per_task": 0.001, "stop_before_limit": 1_000_000}) == []


@pytest.mark.parametrize(("minutes", "fits"), [(1, False), (2, False), (3, True)])
def test_a_job_lasts_longer_than_what_it_keeps_for_saving(minutes: int, fits: bool):
    """120 s are two minutes: a job of two would stop when it begins."""
    found = problems(Limits(minutes=minutes))
    message = (
        f"sft.stop_before_limit 120 (seconds) is not less than the time limit of its job, runtime {minutes} "
        "(minutes), so sft would stop before its first step; lower it, or raise runtime of sft in "
        "set-resources of the profile"
    )
    assert found == ([] if fits else [message])


def test_without_gpus_everything_lies_in_the_memory_of_the_node():
    """The estimate of the default SFT is 153.1 MB for each of two processes, beside 1 GB for programs."""
    sft = {"parallel": {"data_parallel_size": 2}, "mem_gb_per_task": 0.1}
    (asked,) = problems(Limits(mem_mb=200), sft=sft)
    end = (
        ": a process of sft needs 153.1 MB for tensors by the estimate of the dry-run, and about 1 GB for "
        "programs; give more"
    )
    assert asked == f"sft.mem_gb_per_task 0.1{end}"
    (overwritten,) = problems(Limits(mem_mb=2199), sft=sft)  # of 2^20 bytes: 2,305.8 MB, less than 2,306.3
    assert overwritten == f"set-resources sft: mem_mb 2199 of a node with 2 processes{end}"
    assert problems(Limits(mem_mb=2200), sft=sft) == []
    (of_cpus,) = problems(Limits(mem_mb=200, cpus=4), sft=sft)
    assert of_cpus.startswith(
        "set-resources sft: mem_mb_per_cpu 50 of each of 4 CPUs of a node with 2 processes:"
    )


def test_on_gpus_the_node_keeps_the_copy_of_a_checkpoint_and_what_is_offloaded():
    """1,824,904 parameters in fp32: 16 bytes each of a checkpoint.

    In bf16 it is 14, and 12 of moments and main weights that are offloaded.
    """
    gpu = {"gpus_per_node": 2}
    (problem,) = problems(Limits(mem_mb=981), cluster=gpu)  # of 2^20 bytes: 1,028.7 MB
    assert "needs 29.2 MB for the copy of a checkpoint by the estimate" in problem
    assert problems(Limits(mem_mb=982), cluster=gpu) == []
    shared = {"parallel": {"data_parallel_size": 2}}  # by two processes, each with half of it
    assert problems(Limits(mem_mb=1936), cluster=gpu, sft=shared) == []
    (problem,) = problems(Limits(mem_mb=982), cluster=gpu, sft={"offload_optimizer": 1.0}, model=IN_BF16)
    assert "needs 47.4 MB for the copy of a checkpoint and the optimizer's offloaded state" in problem


def test_the_fullest_stage_of_a_pipeline_decides():
    """By layers the first stage has 736,432 parameters, and the last one 1,350,616, of 16 bytes each."""
    parallel = {"pipeline_model_parallel_size": 2, "pipeline_split": "layers"}
    of = {"cluster": {"gpus_per_node": 2}, "sft": {"parallel": parallel}}
    (problem,) = problems(Limits(mem_mb=1948), **of)  # of 2^20 bytes: 2,042.6 MB for two processes
    assert "needs 21.6 MB for the copy of a checkpoint" in problem
    assert problems(Limits(mem_mb=1949), **of) == []


def test_a_checkpoint_of_adapters_holds_them_alone_and_the_merged_one_all_weights():
    """16 bytes of each of 579,072 numbers of adapters, or, in bf16, 2 of each of 1,824,904 parameters."""
    gpu = {"gpus_per_node": 1}
    (problem,) = problems(Limits(mem_mb=962), "lora", cluster=gpu)
    assert "a process of lora needs 9.3 MB for the copy of a checkpoint by" in problem
    assert problems(Limits(mem_mb=963), "lora", cluster=gpu) == []
    offloads: dict[str, Any] = {"cluster": gpu, "lora": {"offload_optimizer": 1.0}, "model": IN_BF16}
    (problem,) = problems(Limits(mem_mb=957), "lora", merges=True, **offloads)
    assert problem.startswith("set-resources merge_lora: mem_mb 957 ")
    assert "a process of merge_lora needs 3.6 MB for the copy of a checkpoint by" in problem
    # It does not stop before the limit.
    assert problems(Limits(mem_mb=958, minutes=1), "lora", merges=True, **offloads) == []
