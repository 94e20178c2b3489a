"""The configurations of hardware: each training fits its GPUs and fills its nodes."""

from __future__ import annotations

from pathlib import Path

from snaketron.config import Config, ConfigError, load
from snaketron.sizes.checks import check_memory
from snaketron.sizes.parameters import num_active_parameters, num_parameters
from snaketron.sizes.plan import estimate
from tests.unit.config.refusals import merged

import pytest
import yaml

CONFIG = Path(__file__).parents[3] / "config"


def of(*names: str, **more: dict) -> Config:
    found: dict = {}
    for name in names:
        found = merged(found, yaml.safe_load((CONFIG / f"{name}.yaml").read_text()))
    return load(merged(found, more), {})


@pytest.mark.parametrize(
    ("names", "nodes"),
    [
        (["super"], {4, 16, 8, 1}),
        (["super", "h100"], {4, 16, 1}),
        (["super", "h200"], {4, 16, 1}),
        (["super", "b200"], {4, 16, 1}),
        (["super", "gb200"], {16, 32, 8, 2}),
        (["nano"], {1}),
    ],
    ids=lambda value: "-".join(map(str, sorted(value, key=str))),
)
def test_every_training_fits_its_gpus(names: list[str], nodes: set[int]):
    config = of(*names)
    check_memory(config, config.trainings())
    gpus = config.cluster.gpus_per_node
    assert {training.run.parallel.world_size / gpus for training in config.trainings()} == nodes


@pytest.mark.parametrize(("gpu", "nodes"), [("h200", 1), ("b200", 1), ("gb200", 2)])
def test_nano_runs_on_other_gpus_by_their_cluster_alone(gpu: str, nodes: int):
    """As config/nano.yaml says: the layouts of these files are those of Super."""
    config = of("nano", cluster=yaml.safe_load((CONFIG / f"{gpu}.yaml").read_text())["cluster"])
    check_memory(config, config.trainings())
    gpus = config.cluster.gpus_per_node
    assert config.cluster.gpu == gpu
    assert {training.run.parallel.world_size / gpus for training in config.trainings()} == {nodes}


def test_long_context_keeps_its_layout_whatever_the_overlay():
    for overlay in ("h100", "h200", "b200", "gb200"):
        at_1m, at_4k = (
            of("super", overlay).training(f"pretrain/{name}") for name in ("long_1m", "mixed_4k_1")
        )
        sizes = [
            (t.run.parallel.pipeline_model_parallel_size, t.run.parallel.world_size) for t in (at_1m, at_4k)
        ]
        assert sizes == [(1, 128), (1, 128)]


@pytest.mark.parametrize(
    ("values", "at"),
    [
        ({"model": {"precision": "nvfp4"}}, "model.precision"),
        ({"sft": {"precision": "nvfp4"}}, "sft.precision"),
    ],
)
def test_nvfp4_is_refused_before_a_hopper_gpu_does(values, at: str):
    hopper = {"cluster": {"gpu": "h100", "gpus_per_node": 8}, "model": {"precision": "bf16"}}
    with pytest.raises(ConfigError) as refused:
        load(hopper | values, {})
    assert str(refused.value) == (
        f"{at} nvfp4 needs a Blackwell GPU, and cluster.gpu is h100; take bf16 or fp8_current"
    )
    load(hopper | values | {"cluster": {"gpu": "b200", "gpus_per_node": 8}}, {})


def test_tuning_may_have_a_precision_of_its_own():
    config = of("super", "b200")
    found = {training.name: training.model.precision for training in config.trainings()}
    assert (found["pretrain/broad"], found["sft"], found["lora"]) == ("nvfp4", "bf16", "bf16")
    assert config.training("sft").at("precision") == "sft.precision"
    assert of("super").training("sft").at("precision") == "model.precision"


def test_nano_has_its_parameters_and_runs_on_two_nodes():
    """31.6 B, 3.6 B of them active, by NVIDIA's report; of two nodes each GPU holds less of the optimizer."""
    config = of("nano")
    assert num_parameters(config.model, 131072).total == pytest.approx(31.6e9, rel=2e-3)
    assert num_active_parameters(config.model, 131072) == pytest.approx(3.6e9, rel=1e-2)
    more = {"parallel": {"data_parallel_size": 16}}
    two = of("nano", pretrain=more, sft=more, lora=more)
    check_memory(two, two.trainings())
    one, other = (estimate(c, c.training("pretrain/broad")) for c in (config, two))
    assert one.checkpoint_bytes == other.checkpoint_bytes and other.memory.total < one.memory.total


def test_the_limits_of_a_section_are_those_of_each_source_without_its_own():
    """What was made elsewhere is not limited."""
    tokens = {"train": ["store/a"]}
    corpora = [
        {"name": "all", "paths": ["raw/a"]},
        {"name": "own", "paths": ["raw/b"], "max_documents": 7},
        {"name": "made", "tokens": tokens},
    ]
    blend = [{"corpus": corpus["name"], "weight": 1} for corpus in corpora]
    values = {
        "corpora": corpora,
        "pretrain": {"phases": [{"name": "one", "tokens": 300_000, "blend": blend}]},
        "pretrain_data": {"max_files": 1, "max_documents": 100},
        "sft_data": {"max_documents": 5},
        "tokenizer": {"path": "store/tokenizer"},
    }
    config = load(values, {})
    assert [(c.max_files, c.max_documents) for c in config.corpora] == [(1, 100), (1, 7), (None, None)]
    assert [(s.max_files, s.max_documents) for s in config.chats] == [(None, 5), (None, 5)]
    assert [(c.max_files, c.max_documents) for c in load({}, {}).corpora] == 4 * [(None, None)]


@pytest.mark.parametrize("gpu", ["a100", "H100", ["h100"]])
def test_a_gpu_that_is_not_known_has_a_way_out(gpu):
    """Pydantic lists what is known and leaves out null, which goes for an A100."""
    with pytest.raises(ConfigError) as refused:
        load({"cluster": {"gpu": gpu}}, {})
    assert str(refused.value) == (
        f"cluster.gpu: {gpu!r} is none of h100, h200, b200, gb200, gb300; null goes for all others, and "
        "their time is estimated where tokens_per_second_per_gpu of a training is stated"
    )
