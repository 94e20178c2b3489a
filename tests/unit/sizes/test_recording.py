"""What GPUs record of a training by themselves."""

from __future__ import annotations

import math
from typing import Any

from snaketron.config import Adapters, Cluster, Model, Parallel, Run, load
from snaketron.sizes.gpus import usable_bytes
from snaketron.sizes.memory import peak_bytes, recorded_memory
from snaketron.sizes.plan import memory_of
from snaketron.sizes.recording import recordable, records_layers
from tests.unit.sizes.models import work

import pytest

NODE = Cluster(gpus_per_node=8)
EP_2 = {"data_parallel_size": 2, "expert_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("run", "more", "recorded"),
    [
        ({}, {}, "micro-batches"),
        ({"parallel": {"data_parallel_size": 8}}, {}, "micro-batches"),
        ({"parallel": {"data_parallel_size": 16}}, {}, "nothing"),  # two nodes
        ({"parallel": EP_2}, {}, "layers"),
        ({"parallel": {"data_parallel_size": 16, "expert_model_parallel_size": 2}}, {}, "nothing"),
        ({"parallel": {"tensor_model_parallel_size": 2}}, {}, "micro-batches"),
        ({"parallel": {"tensor_model_parallel_size": 2}}, {"precision": "fp8_current"}, "micro-batches"),
        ({"parallel": EP_2, "moe_token_dispatcher": "alltoall"}, {}, "layers"),
        ({"parallel": EP_2 | {"tensor_model_parallel_size": 2}}, {}, "layers"),
        ({"parallel": {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}}, {}, "nothing"),
        ({"parallel": EP_2 | {"pipeline_model_parallel_size": 2}}, {}, "nothing"),
        ({"parallel": EP_2 | {"context_parallel_size": 2}}, {}, "nothing"),
        ({"parallel": EP_2}, {"precision": "fp32"}, "nothing"),
        ({"parallel": EP_2}, {"precision": "fp8_current"}, "layers"),
        ({"parallel": EP_2 | {"tensor_model_parallel_size": 2}}, {"precision": "fp8_current"}, "layers"),
        ({"parallel": EP_2}, {"precision": "nvfp4"}, "nothing"),
        ({"parallel": EP_2}, {"packed": True}, "nothing"),
        ({}, {"adapters": Adapters()}, "micro-batches"),
        ({}, {"adapters": Adapters(dropout=0.1)}, "nothing"),
        ({"parallel": EP_2}, {"seq_length": 256}, "nothing"),
        ({"parallel": EP_2, "recompute": ["moe"]}, {}, "nothing"),
        ({"parallel": {"pipeline_model_parallel_size": 2}}, {}, "nothing"),
        ({"parallel": {"context_parallel_size": 2}}, {}, "nothing"),
        ({"parallel": EP_2 | {"expert_tensor_parallel_size": 2}}, {}, "nothing"),
        ({"parallel": EP_2, "moe_token_dispatcher": "deepep"}, {}, "nothing"),
        ({"parallel": EP_2, "moe_shared_expert_overlap": True}, {}, "nothing"),
        ({"parallel": EP_2, "offload_optimizer": 0.5}, {}, "nothing"),
        ({"recompute": ["moe"]}, {}, "nothing"),
        ({"recompute": ["scan"]}, {}, "micro-batches"),
        ({}, {"packed": True}, "micro-batches"),
        ({}, {"packed": True, "precision": "fp8_delayed"}, "micro-batches"),
        ({}, {"packed": True, "precision": "fp8_blockwise"}, "nothing"),
        ({}, {"precision": "fp8_blockwise"}, "micro-batches"),
        ({}, {"seq_length": 256}, "nothing"),
        ({}, {"precision": "fp8_current"}, "micro-batches"),
        ({}, {"precision": "nvfp4"}, "nothing"),
    ],
)
def test_micro_batches_are_recorded_where_a_gpu_holds_the_model_and_layers_where_gpus_share_it(
    run: dict[str, Any], more: dict[str, Any], recorded: str
):
    asked = {"precision": "bf16", "seq_length": 512, "packed": False, "adapters": None} | more
    about, length = (Model(precision=asked["precision"]), Run.model_validate(run)), asked["seq_length"]
    where: dict[str, Any] = {"packed": asked["packed"], "cluster": NODE}
    does = work(*about, length=length)
    found = [
        recordable(*about, length, adapters=asked["adapters"], **where),
        records_layers(does, usable=math.inf, **where),
    ]
    assert found == [recorded == "micro-batches", recorded == "layers"]


# Each attention layer keeps for a token 64 numbers of the norm, 64 of queries and the output, and 32 of keys
# and values.
KEPT = 64 + 64 + 32
SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 8},
    **{"mtp_num_layers": 0, "precision": "bf16"},
}


@pytest.mark.parametrize(("precision", "more"), [("bf16", 1), ("fp8_current", 1.6)])
def test_layers_are_recorded_where_what_they_keep_has_room_once_more(precision: str, more: float):
    model = Model(hybrid_layer_pattern="*E*", **SIZES | {"precision": precision})
    does = work(model, Run(micro_batch_size=1, parallel=Parallel(**EP_2)), length=512)
    needed = peak_bytes(does) + more * 2 * 512 * 2 * KEPT
    for usable, recorded in ((needed, True), (needed - 1, False)):
        assert records_layers(does, packed=False, cluster=NODE, usable=usable) is recorded


def recorded(cuda_graphs: bool | None, parallel: dict[str, int], **cluster: Any) -> tuple[float, float]:
    """Bytes of the recordings of a training of 512 tokens, and its peak without them."""
    pretrain = {"seq_length": 512, "micro_batch_size": 1, "parallel": parallel, "cuda_graphs": cuda_graphs}
    model = {"hybrid_layer_pattern": "*E*E", **SIZES}
    sections = {"model": model, "pretrain": pretrain, "cluster": {"gpus_per_node": 8} | cluster}
    parts = memory_of(config := load(sections, {}), config.training("pretrain/broad"))
    return parts.recordings, parts.total - parts.recordings


def test_a_plan_counts_recordings_that_are_asked_for_and_those_that_the_program_makes():
    """Two attention layers keep what they keep of 512 tokens, in 2 bytes each, once more."""
    both, _ = recorded(True, EP_2)
    assert both == 2 * 512 * 2 * KEPT == recorded(True, {})[0] == recorded(None, EP_2)[0]
    assert recorded(True, {"tensor_model_parallel_size": 2})[0] == both / 2
    assert recorded(True, {"pipeline_model_parallel_size": 2})[0] == both / 2  # the last stage is the fullest
    assert recorded(None, {})[0] == recorded(False, EP_2)[0] == 0  # micro-batches as a whole, and nothing
    _, without = recorded(None, EP_2)
    for room, made in ((both, both), (both - 1, 0)):
        assert recorded(None, EP_2, gpu_memory_gb=(without + room) / 1e9)[0] == made


def test_a_stage_has_recordings_of_each_micro_batch_that_it_keeps():
    """The first of two stages has a layer of the two, and keeps two micro-batches."""
    run = Run(micro_batch_size=1, parallel=Parallel(pipeline_model_parallel_size=2))
    model = Model(hybrid_layer_pattern="*E*E", **SIZES)
    assert recorded_memory(work(model, run, length=512)) == [2 * 512 * 2 * KEPT, 512 * 2 * KEPT]


def test_where_there_is_no_gpu_nothing_is_recorded():
    config = load({"model": {"hybrid_layer_pattern": "*E*E", **SIZES}, "pretrain": {"seq_length": 512}}, {})
    assert memory_of(config, config.training("pretrain/broad")).recordings == 0


def test_what_a_training_may_fill_is_configured_or_known_of_the_kind_of_gpu():
    for cluster, expected in (
        (Cluster(gpus_per_node=8, gpu="h200", gpu_memory_gb=100), 100e9),
        (Cluster(gpus_per_node=8, gpu="h200"), 132e9),
        (Cluster(gpus_per_node=8), None),
    ):
        assert usable_bytes(cluster) == expected
