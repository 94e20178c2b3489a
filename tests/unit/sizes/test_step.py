"""The terms of a step, worked out by hand for a GPU whose peaks are round numbers."""

from __future__ import annotations

from typing import Any

from snaketron.config import Lora, Model, Optimizer, Parallel, Run
from snaketron.sizes import compute
from snaketron.sizes.gpus import Gpu
from snaketron.sizes.step import HOST_ADAM, Step, step_time
from snaketron.sizes.work import Work

import pytest

# 1 GB/s over the network and 10 GB/s over NVLink, of which programs reach 80 and 62 %; 2 GPUs a node.
GPU = Gpu(1e12, 1e12, 10e9, 2, 1e9, 2, 70)


def of(model: dict[str, Any], batch: int = 4, kind: type[Run] = Run, **run: Any) -> Step:
    parallel = {f"{name}_parallel_size": size for name, size in run.pop("parallel", {}).items()}
    dispatcher = run.pop("dispatcher", "alltoall")
    work = Work(
        model=Model(precision="bf16", mtp_num_layers=0, **model),
        vocab_size=512,
        seq_length=1000,
        global_batch_size=batch,
        run=kind(micro_batch_size=1, parallel=Parallel(**parallel), **run),
        optimizer=Optimizer(),
        dispatcher=dispatcher,
    )
    return step_time(work, GPU)


def test_copies_of_tokens_cross_nvlink_and_the_network():
    """4 GPUs in 2 nodes: of 2 copies of 64 numbers, a quarter goes to the other GPU, half over the network.

    A step is 1,000 tokens on each; copies go there and back, forwards and backwards.
    """
    experts = {"hybrid_layer_pattern": "E", "moe_router_topk": 2, "moe_latent_size": 64}
    found = of(experts, parallel={"expert_model": 4, "data": 4})
    of_copy = 128 * (0.25 / 6.2e9 + 0.5 / 0.8e9)
    assert found.exchange == pytest.approx(4 * 1000 * 2 * of_copy)
    again = of(experts, parallel={"expert_model": 4, "data": 4}, recompute=["moe"])
    assert again.exchange == pytest.approx(found.exchange * 1.5)
    # HybridEP sends a token once to the other node, if one of the two copies is for it: 1 - 1/4.
    once = of(experts, parallel={"expert_model": 4, "data": 4}, dispatcher="hybridep")
    assert once.exchange == pytest.approx(4 * 1000 * 128 * (0.75 / 0.8e9 + 2 / 6.2e9))
    assert of(experts).exchange == 0


def test_tokens_that_are_gathered_cross_once_to_each_gpu():
    """4 GPUs in 2 nodes: a token of 64 numbers goes to one GPU over NVLink and to two over the network.

    There it has 2 bytes a number, and 4 for each of the 2 experts of the GPU; on its way back, when it is
    added up, 4 bytes a number. Forwards and backwards, for 1,000 tokens.
    """
    experts = {"hybrid_layer_pattern": "E", "moe_latent_size": 64, "num_moe_experts": 8}
    found = of(experts, parallel={"expert_model": 4, "data": 4}, dispatcher="allgather")
    both_ways = 64 * 2 + 2 * 4 + 64 * 4
    assert found.exchange == pytest.approx(2 * 1000 * both_ways * (1 / 6.2e9 + 2 / 0.8e9))


def test_stages_of_a_pipeline_wait_for_each_other():
    """The layers are equal: the stage with the output layer is slower, and waits for the other once."""
    whole = of({"hybrid_layer_pattern": "--"})
    halves = of({"hybrid_layer_pattern": "--"}, parallel={"pipeline_model": 2})
    assert halves.dense == pytest.approx(whole.dense / 2)
    # The bubble of 4 micro-batches: the other stage computes one, without the output layer.
    assert 0 < halves.bubble < (halves.dense + halves.output + halves.host) / 4
    assert halves.output == pytest.approx(whole.output)


def test_gradients_are_summed_and_weights_gathered():
    """4 + 2 bytes a parameter, half of them to the other GPU of the node."""
    found = of({"hybrid_layer_pattern": "-"}, parallel={"data": 2})
    parameters = 2 * 128 * 256 + 2 * 512 * 128 + 2 * 128
    assert found.sums == pytest.approx(parameters * 6 * 0.5 / 6.2e9)


def test_the_host_is_the_limit_of_small_micro_batches():
    """4 micro-batches of a layer that the GPU computes at once: the time to start it, 4 times."""
    assert of({"hybrid_layer_pattern": "-"}).total == pytest.approx(4 * compute.LAYER_ON_HOST, rel=0.1)


@pytest.mark.parametrize(
    ("parallel", "power", "slower"),
    [
        ({"data": 2}, 8, 1.0),
        ({"data": 2, "expert_model": 2}, 3, 1.0),
        ({"data": 2, "expert_tensor": 2}, 3, 1.0),
        ({"tensor_model": 2}, 3, 1.45),
        ({"context": 2}, 3, 1.45),
    ],
)
def test_gpus_that_wait_for_each_other_in_each_layer_wait_longer_for_the_host(
    parallel: dict[str, int], power: int, slower: float
):
    """A layer that the GPU computes nearly as long as the host starts it, 6.8 ms."""
    model = {"hybrid_layer_pattern": "E", "hidden_size": 512, "moe_latent_size": 256}
    found = of(model, batch=2, parallel=parallel)
    micro_batches = 2 // parallel.get("data", 1)
    computing = (
        sum(getattr(found, term) for term in ("experts", "output", "exchange", "tensor", "context"))
        / micro_batches
    )
    starting = compute.LAYER_ON_HOST * slower
    assert 0.2 * starting < computing < 5 * starting
    together = (computing**power + starting**power) ** (1 / power)
    assert found.host == pytest.approx(micro_batches * (together - computing))


def test_adapters_and_recomputation_change_what_is_computed():
    """Frozen layers have one product of three less; layers that are computed again have one more."""
    model = {"hybrid_layer_pattern": "-", "hidden_size": 4096, "ffn_hidden_size": 16384}
    once, again = of(model), of(model, recompute=["layer"])
    assert again.dense == pytest.approx(once.dense * 4 / 3)
    adapters = of(model, kind=Lora, rank=1, target_modules=["linear_fc1"])
    assert adapters.dense == pytest.approx(once.dense * 2 / 3, rel=1e-3)


def test_adapters_move_what_goes_into_their_layers_and_out():
    """An MLP has 32 and 64 numbers: inputs move 4 times and outputs 6 times, with 2 bytes each, at 0.8 TB/s.

    A token has three such layers where it goes to two experts and the shared one, and two where only the
    experts are adapted.
    """
    experts = {"hybrid_layer_pattern": "E", "hidden_size": 32, "moe_latent_size": None, "moe_router_topk": 2}
    experts |= {"moe_ffn_hidden_size": 64, "moe_shared_expert_intermediate_size": 64}
    of_layer = 2 * (4 * 32 + 6 * 64) / 0.8e12
    lora: dict[str, Any] = {"kind": Lora, "rank": 1}
    none = of(experts, **lora, target_modules=["router"]).experts
    router = 2 * (4 * 32 + 6 * Model().num_moe_experts) / 0.8e12
    for target, layers in (("linear_fc1", 3), ("experts.linear_fc1", 2)):
        found = of(experts, **lora, target_modules=[target]).experts
        assert found - none == pytest.approx(4 * 1000 * (layers * of_layer - router))


def test_the_update_of_adapters_is_theirs_alone():
    """Rank 2 between 128 and 256 numbers: 768 parameters, of which 4 + 2 bytes go to the other GPU.

    Where the optimizer is on the host, the GPU does not read and write 12 bytes of state of each.
    """
    lora: dict[str, Any] = {"kind": Lora, "rank": 2, "target_modules": ["linear_fc1"]}
    model = {"hybrid_layer_pattern": "-", "hidden_size": 128, "ffn_hidden_size": 256}
    adapters = 2 * (128 + 256)
    two = of(model, parallel={"data": 2}, **lora)
    assert two.sums == pytest.approx(adapters * 6 * 0.5 / 6.2e9)
    here, on_host = of(model, **lora), of(model, **lora, offload_optimizer=1.0)
    expected = adapters * (HOST_ADAM - 2 * 12 / 0.8e12)
    assert on_host.optimizer - here.optimizer == pytest.approx(expected)
