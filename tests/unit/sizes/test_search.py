"""Layouts that fit, and their order."""

from __future__ import annotations

from pathlib import Path

from snaketron.config import Config, Parallel, load
from snaketron.report.layouts import markdown
from snaketron.sizes.gpus import GPUS, in_nodes
from snaketron.sizes.layout import layout_sizes
from snaketron.sizes.search import Found, measure, place, search, why_none

import pytest
import yaml

CONFIG = Path(__file__).parents[3] / "config"


@pytest.fixture(scope="module")
def config() -> Config:
    return load(yaml.safe_load((CONFIG / "super.yaml").read_text()), {})


def by_layers(found: list[Found]) -> list[Found]:
    """Those whose stages have equally many layers, as published ones have: others are faster since."""
    return [
        one
        for one in found
        if one.parallel.pipeline_model_parallel_size == 1 or one.parallel.pipeline_split == "layers"
    ]


def test_what_is_found_fits_and_the_fastest_comes_first(config: Config):
    found = search(config, config.training("pretrain/broad"), "b200", 64)
    assert found and all(one.peak_bytes <= 170e9 and one.parallel.world_size == 64 for one in found)
    times = [one.step.total for one in found]
    assert times == sorted(times)
    # 3,072 sequences are whole micro-batches of every copy.
    assert all(3072 % (one.parallel.data_parallel_size * one.micro_batch_size) == 0 for one in found)
    text = markdown(config.training("pretrain/broad"), "64 B200", found, found[0])
    assert "exchange" in text and ": place 1 of " in text


def test_where_nvlink_reaches_all_experts_the_published_layout_is_among_the_first(config: Config):
    """64 GB200: TP 2, EP 64 of the recipe. It is beaten by less tensor parallelism, which waits more."""
    found = search(config, config.training("pretrain/broad"), "gb200", 64)
    published = Parallel(tensor_model_parallel_size=2, expert_model_parallel_size=64, data_parallel_size=32)
    number = place(by_layers(found), published)
    assert number is not None and number <= 10


def test_a_dispatcher_that_sends_a_token_once_to_each_node_has_experts_over_several_nodes(config: Config):
    """64 H100: PP 2, EP 32, measured with HybridEP; one by one, copies take three times as long."""
    precision = {"gradient_precision": "bf16", "moment_precision": "bf16"}
    optimizer = config.pretrain.optimizer.model_copy(update=precision)
    places = {}
    for dispatcher in ("hybridep", "alltoall"):
        run = {"moe_token_dispatcher": dispatcher, "optimizer": optimizer}
        changed = config.model_copy(update={"pretrain": config.pretrain.model_copy(update=run)})
        found = search(changed, changed.training("pretrain/broad"), "h100", 64)
        published = Parallel(
            pipeline_model_parallel_size=2, expert_model_parallel_size=32, data_parallel_size=32
        )
        places[dispatcher] = place(by_layers(found), published)
    assert places["hybridep"] <= 10 < places["alltoall"]


def test_the_published_layout_of_1m_is_among_the_first(config: Config):
    found = search(config, config.training("pretrain/long_1m"), "gb200", 128)
    number = place(by_layers(found), config.training("pretrain/long_1m").run.parallel)
    assert number is not None and number <= 10


def test_the_memory_that_is_configured_is_that_of_the_configured_gpu():
    """Nano on one node: on H200s layers are recorded, for which 74 GB of an H100 would have no room."""
    nano = yaml.safe_load((CONFIG / "nano.yaml").read_text())
    of = {"h100": {"gpu": "h100", "gpu_memory_gb": 74}, "h200": {"gpu": "h200", "gpu_memory_gb": 132}}
    configs = {gpu: load(nano | {"cluster": nano["cluster"] | cluster}, {}) for gpu, cluster in of.items()}
    h100, h200 = (search(c, c.training(c.trainings()[0].name), "h200", 8) for c in configs.values())
    assert h100 and [one.step for one in h100] == [one.step for one in h200]


def test_both_splits_of_a_pipeline_are_tried(config: Config):
    """32 B200s, PP 2, EP 8: stages of equal time are faster. A table has a row for the better split alone."""
    training = config.training("pretrain/broad")
    found = search(config, training, "b200", 32)
    by_time, *_ = alike = [one for one in found if layout_sizes(one.parallel) == (1, 2, 1, 8, 1, 16)]
    assert by_time.parallel.pipeline_split == "time"
    assert "layers" in {one.parallel.pipeline_split for one in alike}
    whole = [one for one in found if one.parallel.pipeline_model_parallel_size == 1]
    assert {one.parallel.pipeline_split for one in whole} == {"time"}  # there is nothing to split
    text = markdown(training, "32 B200", alike, by_time)
    assert "PP 2, EP 8, DP 16" in text and "by layers" not in text and "place 1 of 1." in text
    text = markdown(training, "32 B200", by_layers(alike), by_time)
    assert "PP 2 by layers, EP 8, DP 16" in text


def test_nodes_are_as_large_as_they_are_configured(config: Config):
    """Nodes of four H100s: tensor parallelism stays within four, and experts over eight cross the network."""
    cluster = config.cluster.model_copy(update={"gpu": "h100", "gpus_per_node": 4})
    four = in_nodes("h100", cluster)
    assert (four.gpus_per_node, four.domain) == (4, 4) and in_nodes("h200", cluster) == GPUS["h200"]
    found = search(
        config.model_copy(update={"cluster": cluster}), config.training("pretrain/broad"), "h100", 128
    )
    assert found and max(one.parallel.tensor_model_parallel_size for one in found) == 4
    racks = cluster.model_copy(update={"gpu": "gb200", "gpus_per_node": 2})
    assert (in_nodes("gb200", racks).gpus_per_node, in_nodes("gb200", racks).domain) == (2, 72)


def test_a_rack_whose_gpus_are_no_power_of_two_is_divided_into_stages(config: Config):
    """72 = 8 x 9, and 3,072 sequences have one factor 3, so 3, 6, 9 or 12 stages. Nothing fitted."""
    found = search(config, config.training("pretrain/broad"), "gb300", 72)
    stages = {one.parallel.pipeline_model_parallel_size for one in found}
    assert {3, 9} <= stages <= {3, 6, 9, 12}
    assert all(one.parallel.world_size == 72 for one in found)
    assert all(3072 % one.parallel.data_parallel_size == 0 for one in found)


def test_too_few_gpus_have_no_layout(config: Config):
    broad = config.training("pretrain/broad")
    assert search(config, broad, "h100", 8) == []
    why = why_none(config, broad, "h100", 8)
    assert why.startswith(
        "The one that needs least, TP 8, EP 8, takes 286.6 GB of a GPU, of which 74 GB can "
    )
    assert why.endswith(
        "Take more GPUs, or bf16 for gradient_precision and moment_precision of pretrain.optimizer."
    )
    text = markdown(broad, "8 H100", [], measure(config, broad, GPUS["h100"]), why)
    assert f"No layout fits. {why}" in text and "not among them" in text


@pytest.mark.parametrize(
    ("gpu", "gpus", "why"),
    [
        (
            "h100",
            12,
            "pretrain.parallel: 12 processes do not fill nodes of cluster.gpus_per_node 8; 8 or 16 ",
        ),
        (
            "gb200",
            68,
            "pretrain.global_batch_size 3072 is not divisible by micro_batch_size 1 x data_parallel",
        ),
    ],
)
def test_a_rule_that_every_layout_breaks_is_named_and_not_the_memory(config, gpu: str, gpus: int, why: str):
    broad = config.training("pretrain/broad")
    assert search(config, broad, gpu, gpus) == []
    assert why in why_none(config, broad, gpu, gpus)


def test_what_a_precision_does_not_recompute_hides_nothing_else(config: Config):
    """`fp8_delayed` recomputes neither norms nor, with multi-token prediction, whole layers."""
    model = config.model.model_copy(update={"precision": "fp8_delayed", "bf16_layers_at_end": 0})
    changed = config.model_copy(update={"model": model})
    training = changed.training("pretrain/broad")
    found = search(changed, training, "b200", 64)
    assert {one.micro_batch_size for one in found} > {1}
    assert {"moe"} <= {part for one in found for part in one.recompute} <= {"moe", "scan"}
    assert why_none(changed, training, "h100", 2).startswith("The one that needs least, ")
