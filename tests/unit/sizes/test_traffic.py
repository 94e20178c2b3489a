"""What a GPU sends, worked out by hand for 4 GPUs in 2 nodes."""

from __future__ import annotations

from typing import Any

from snaketron.config import Model, Optimizer, Parallel, Run
from snaketron.sizes.gpus import Gpu
from snaketron.sizes.traffic import Moved, traffic
from snaketron.sizes.work import Work

import pytest

GPU = Gpu(1e12, 1e12, 10e9, 2, 1e9, 2, 70)  # two GPUs a node; 10 GB/s over NVLink, 1 over the network
MODEL: dict[str, Any] = {"hidden_size": 128, "moe_latent_size": 64, "mtp_num_layers": 0}


def of(pattern: str, batch: int = 4, **parallel: int) -> dict[str, Moved]:
    return traffic(
        Work(
            model=Model(precision="bf16", hybrid_layer_pattern=pattern, moe_router_topk=2, **MODEL),
            vocab_size=512,
            seq_length=1000,
            global_batch_size=batch,
            run=Run(
                micro_batch_size=1,
                parallel=Parallel(**{f"{name}_parallel_size": size for name, size in parallel.items()}),
            ),
            optimizer=Optimizer(),
        ),
        GPU,
    )


def test_a_gpu_alone_sends_nothing():
    assert set(of("ME*-").values()) == {Moved()}


def test_copies_of_tokens_go_to_experts_of_both_nodes():
    """1,000 tokens, 2 copies of 64 numbers of 2 bytes, there and back, forwards and backwards.

    One of 4 GPUs is in the same node: a quarter goes over NVLink, half over the network.
    """
    copies = 1000 * 2 * 64 * 2 * 2 * 2
    assert of("E", expert_model=4, data=4)["experts"] == Moved(copies / 4, copies / 2)


def test_stages_send_hidden_states_forwards_and_gradients_backwards():
    """4 micro-batches of 1,000 tokens of 128 numbers; the last stage sends gradients alone."""
    hidden = 4 * 1000 * 128 * 2
    assert of("--", pipeline_model=2)["pipeline"] == Moved(nvlink=hidden)
    assert of("----", pipeline_model=4)["pipeline"] == Moved(network=2 * hidden)


def test_tensor_parallelism_divides_what_the_pipeline_sends():
    found = of("--", pipeline_model=2, tensor_model=2)
    assert found["pipeline"] == Moved(network=4 * 500 * 128 * 2)
    # The last stage: a layer, 2.5 exchanges forwards and as many backwards, and 3 of the output layer.
    assert found["tensor"].nvlink == pytest.approx(4 * (5 + 3) * 1000 * 128 * 2 / 2)
    assert found["tensor"].network == 0


def test_the_stage_of_most_layers_sends_most():
    """Three MLPs, with 5 exchanges each, and the output layer, with 3: the first stage has two MLPs."""
    found = of("-----", pipeline_model=2, tensor_model=2)
    assert found["tensor"].nvlink == pytest.approx(4 * (3 * 5 + 3) * 1000 * 128 * 2 / 2)


def test_gradients_are_summed_and_weights_gathered_over_all_copies():
    """4 + 2 bytes of each parameter, to 3 of 4 GPUs and so over the network."""
    parameters = 2 * 128 * 256 + 2 * 512 * 128 + 2 * 128
    assert of("-", data=4)["sums"].network == pytest.approx(parameters * 6 * 0.75)
    assert of("-", data=2, batch=2)["sums"].nvlink == pytest.approx(parameters * 6 * 0.5)
