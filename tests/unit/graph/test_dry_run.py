"""Times and sizes of a dry-run, worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from snaketron.config import load
from snaketron.graph.dry_run import describe, size_lines, time_line
from snaketron.sizes.plan import estimate

import pytest


def training(
    tokens: int,
    speed: float | None,
    parallel: dict[str, int],
    cluster: dict[str, Any] | None = None,
    **keys: Any,
):
    phase = {"name": "one", "tokens": tokens, "blend": [{"corpus": "docs", "weight": 1}]}
    pretrain = {"phases": [phase], "warmup_tokens": 0, "decay_tokens": 0, "tokens_per_second_per_gpu": speed}
    pretrain |= {
        "parallel": parallel,
        "seq_length": 250,
        "global_batch_size": 4,
        "micro_batch_size": 1,
        **keys,
    }
    config = load({"pretrain": pretrain, "cluster": {"gpus_per_node": 2} | (cluster or {})}, {})
    return config, config.training("pretrain/one")


def test_the_time_follows_from_tokens_throughput_and_gpus():
    """7.2 million tokens at 100 a second on each of 4 GPUs are 18,000 s: 5 hours."""
    config, one = training(7_200_000, 100, {"data_parallel_size": 4})
    assert estimate(config, one).hours == pytest.approx(5)
    assert estimate(config, one).process_hours == pytest.approx(20)
    assert time_line(one, estimate(config, one), 600) == "7.2 M tokens at 100 tokens/s on each: 5.0 h"


def test_a_time_limit_cuts_it_into_jobs():
    """5 hours in jobs of 2 hours that hand over 20 minutes before their end: three of 1 h 40."""
    config, one = training(7_200_000, 100, {"data_parallel_size": 4}, stop_before_limit=1200)
    assert (
        time_line(one, estimate(config, one), 120)
        == "7.2 M tokens at 100 tokens/s on each: 5.0 h, in 3 jobs of 2.0 h"
    )


def test_an_estimated_time_stands_beside_that_at_the_published_speed():
    config, one = training(7_200_000, None, {"data_parallel_size": 2}, cluster={"gpu": "h100"})
    needs = estimate(config, one)
    assert needs.speed and needs.published
    once, others = (7_200_000 / found.tokens_per_second / 2 / 60 for found in (needs.speed, needs.published))
    assert time_line(one, needs, 600) == (
        f"7.2 M tokens at {needs.speed.tokens_per_second:,.0f} tokens/s on each (estimated): {once:.1f} min; "
        f"{others * 60:.1f} s at the published speed of such GPUs"
    )


def test_without_a_throughput_there_is_no_estimate():
    """Nor with a GPU that no node has."""
    for cluster in ({}, {"gpu": "h100", "gpus_per_node": 0}):
        config, one = training(10_500, None, {}, cluster)
        assert time_line(one, estimate(config, one), 60) == (
            "11.0 k tokens; name cluster.gpu and gpus_per_node, or state tokens_per_second_per_gpu, "
            "for an estimate of the time"
        )


def test_the_layout_names_what_is_shared():
    config, one = training(1000, None, {"tensor_model_parallel_size": 2, "data_parallel_size": 2})
    size, layout, memory = size_lines(config, one, estimate(config, one))
    assert layout == "4 GPUs: TP 2, DP 2"
    assert size == "1.4 M parameters, 1.1 M active a token"
    assert "MB of weights, gradients and optimizer on each, " in memory
    assert memory.endswith(" MB with activations")


def test_the_memory_of_recordings_is_said_where_layers_are_recorded():
    config, one = training(1000, None, {"data_parallel_size": 2}, cuda_graphs=True)
    *_, memory = size_lines(config, one, estimate(config, one))
    assert memory.endswith(" MB with activations and recordings")


def test_the_plan_of_lora_counts_its_adapters_and_little_memory():
    """A fourteenth of the gradients and moments is left: 6.9 MB instead of 21.6 MB."""
    config = load({"tokenizer": {"vocab_size": 2048}, "lora": {"rank": 8, "expert_rank": None}}, {})
    full, lora = (
        size_lines(config, one, estimate(config, one)) for one in map(config.training, ("sft", "lora"))
    )
    size, _, memory = lora
    assert size == "1.4 M parameters, 1.1 M active a token, 94.3 k of adapters trained"
    assert memory.startswith("6.9 MB of weights, gradients and optimizer on each, ")
    assert full[2].startswith("21.6 MB of weights, ")


def test_files_that_take_longer_than_the_time_limit_are_told_before_they_are_read():
    """A group reads its shards one after the other, for 80 and 30 minutes; its limit is 60."""

    def job(*minutes: float) -> SimpleNamespace:
        shards = [SimpleNamespace(rule=SimpleNamespace(name="render_chat"), minutes=m) for m in minutes]
        asked = {"slurm_partition": "cpu", "runtime": 60}
        return SimpleNamespace(jobs=shards, is_group=lambda: True, resources=asked, threads=1)

    def plan(*jobs: SimpleNamespace) -> str | None:
        return describe(load({}, {}), jobs, lambda job: "-t 60", lambda shard: shard.minutes * 60)

    said = "\n    about 1.8 h by the sizes of its files, more than the limit of 1.0 h: raise `runtime` in the"
    assert said in str(plan(job(1, 2), job(80, 30)))
    assert plan(job(20, 30)) == (
        "To be submitted to Slurm:\n\n  a group of 2 render_chat\n    sbatch -t 60\n\n"
        "At most 1 CPU hours for data, by the time limits."
    )
