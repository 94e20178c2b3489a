"""The smallest change with which a training fits."""

from __future__ import annotations

import re
from typing import Any

from snaketron.config import ConfigError, load
from snaketron.sizes.checks import check_memory
from snaketron.sizes.fitting import smallest_change
from snaketron.sizes.plan import estimate
from tests.unit.sizes.models import COUNTED

import pytest


def change(limit_gb: float | None, **sft: Any):
    config = load(
        COUNTED | {"cluster": {"gpus_per_node": 2, "gpu_memory_gb": limit_gb}, "sft": COUNTED["sft"] | sft},
        {},
    )
    return config, smallest_change(config, config.training("sft"))


def test_the_layout_changes_before_more_gpus_are_asked_for():
    """Two copies take 110.9 MB each, 108.8 where they share the experts, 61.8 where they share each layer."""
    config, found = change(0.11, parallel={"data_parallel_size": 2})
    assert estimate(config, config.training("sft")).memory.total == pytest.approx(0.1109e9, rel=1e-3)
    assert found is not None
    said, needs = found
    assert said == "sft.parallel: expert_model_parallel_size 1 -> 2"
    assert needs.memory.total == pytest.approx(0.1088e9, rel=1e-3)
    _, found = change(0.1, parallel={"data_parallel_size": 2})
    assert found and found[0] == (
        "sft.parallel: tensor_model_parallel_size 1 -> 2, data_parallel_size 2 -> 1"
    )


@pytest.mark.parametrize(("limit_gb", "modules"), [(0.115, "scan"), (0.1, "moe"), (0.07, "layer")])
def test_activations_are_computed_again_where_no_layout_helps(limit_gb: float, modules: str):
    """118.2 MB; 113.7 where the scan is computed again, 92.7 where experts are, 66.4 where all layers are."""
    _, found = change(limit_gb)
    assert found is not None and found[0] == f"sft.recompute: [{modules}]"


def test_a_smaller_micro_batch_comes_before_another_layout():
    """Four sequences at a time take 110.9 MB of a GPU, two 66.4, and one 44.2."""
    pretrain = {"micro_batch_size": 4, "parallel": {"data_parallel_size": 2}, "global_batch_size": 8}
    cluster = {"gpus_per_node": 2, "gpu_memory_gb": 0.06}
    config = load(COUNTED | {"cluster": cluster, "pretrain": pretrain}, {})
    found = smallest_change(config, config.training("pretrain/broad"))
    assert found is not None and found[0] == "pretrain.micro_batch_size: 1"


def test_recordings_that_have_no_room_are_left_to_the_program():
    """It takes 64.3 MB, and recordings 15.7 more."""
    parallel = {"data_parallel_size": 2, "expert_model_parallel_size": 2}
    pretrain = {"parallel": parallel, "micro_batch_size": 1, "cuda_graphs": True, "seq_length": 512}
    limits = {"gpus_per_node": 2, "gpu_memory_gb": 0.075}
    config = load(COUNTED | {"cluster": limits, "pretrain": pretrain}, {})
    training = config.training("pretrain/broad")
    said = "pretrain.cuda_graphs: null, which records where there is room"
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_memory(config, [training])


def test_nothing_is_found_for_what_cannot_fit_or_is_not_limited():
    assert change(0.0001)[1] is None
    assert change(None)[1] is None


def test_tensor_parallelism_stays_within_a_node():
    """Two GPUs a node: eight processes are found by other sizes."""
    _, found = change(0.02, parallel={"data_parallel_size": 2}, recompute=["layer"])
    assert found is None or "tensor_model_parallel_size 1 -> 4" not in found[0]


def test_stages_of_equally_many_layers_come_before_other_layouts():
    """Of equal time they are MEMEME and ME: the first one takes 99.8 MB; by layers 97.4."""
    model = {"hybrid_layer_pattern": "MEMEMEME", "mtp_num_layers": 2, "mtp_hybrid_layer_pattern": "*E"}
    sft = COUNTED["sft"] | {"parallel": {"pipeline_model_parallel_size": 2}}
    cluster = {"gpus_per_node": 2, "gpu_memory_gb": 0.099}
    config = load({"model": model, "cluster": cluster, "sft": sft}, {})
    assert estimate(config, config.training("sft")).memory.total == pytest.approx(0.0998e9, rel=1e-3)
    found = smallest_change(config, config.training("sft"))
    assert found is not None
    said, needs = found
    assert said == "sft.parallel: pipeline_split time -> layers"
    assert needs.memory.total == pytest.approx(0.0974e9, rel=1e-3)
