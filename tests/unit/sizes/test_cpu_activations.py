"""What a CPU keeps for the backward pass: what autograd saves in models that are built, and sums by hand."""

from __future__ import annotations

from typing import Any

from snaketron.config import Model, Parallel, Run, load
from snaketron.model import backend
from snaketron.model.megatron import mamba2
from snaketron.sizes import cpu_activations
from snaketron.sizes.cpu_activations import cpu_activation_memory, cpu_layer_activations
from snaketron.sizes.plan import memory_of
from tests.unit.sizes.models import HAND, SMALL, work

import pytest
import torch

VOCABULARY, LENGTH, BATCH = 256, 64, 2


def saved_bytes(model: torch.nn.Module, length: int = LENGTH) -> int:
    """Bytes that autograd saves in a forward pass, without parameters; each storage counts once."""
    known = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(VOCABULARY, (BATCH, length))
    positions = torch.arange(length).expand(BATCH, -1)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = model(ids, positions, None, labels=ids, loss_mask=torch.ones(ids.shape))
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.skipif(backend.HAS_GPU, reason="a GPU has other layers")
@pytest.mark.parametrize(
    "keys",
    [
        {"hybrid_layer_pattern": "MMM", "mtp_num_layers": 0},
        {"hybrid_layer_pattern": "***", "mtp_num_layers": 0},
        {"hybrid_layer_pattern": "EEE", "mtp_num_layers": 0},
        {"hybrid_layer_pattern": "---", "mtp_num_layers": 0},
        {"hybrid_layer_pattern": "EEE", "mtp_num_layers": 0, "moe_latent_size": None},
        {},
        {"precision": "bf16"},
    ],
)
def test_autograd_saves_what_is_predicted(build: Any, keys: dict[str, Any]):
    does = work(Model(**(SMALL | keys)), Run(micro_batch_size=BATCH), vocab_size=VOCABULARY, length=LENGTH)
    (predicted,) = cpu_activation_memory(does)
    assert saved_bytes(build(VOCABULARY, **keys)) == pytest.approx(predicted, rel=0.02)


@pytest.mark.skipif(backend.HAS_GPU, reason="a GPU has other layers")
@pytest.mark.parametrize("length", [8, 33, 100])
def test_the_scan_of_a_sequence_keeps_whole_chunks(build: Any, length: int):
    """It is filled up: 33 tokens take as much as 64."""
    keys = SMALL | {"hybrid_layer_pattern": "MMM", "mtp_num_layers": 0}
    does = work(Model(**keys), Run(micro_batch_size=BATCH), vocab_size=VOCABULARY, length=length)
    (predicted,) = cpu_activation_memory(does)
    assert saved_bytes(build(VOCABULARY, **keys), length) == pytest.approx(predicted, rel=0.02)


def test_the_chunks_of_the_scan_are_those_of_a_cpu():
    assert cpu_activations.CHUNK == mamba2.CHUNK_SIZE


# A norm of 10 channels: its input, what it makes of it, and the input of what follows.
NORM = 3 * 10
# z 8, x B C 18, dt 2; x B C convolved and activated, B and C by chunks; step and two decays of 2 heads; 32
# pairs of the group and of each head, twice; B and C for each head; 8 x 5 of a state every 32 tokens; x by
# its step and the output.
SCAN = 28 + 2 * 18 + 10 + 3 * 2 + 32 * (1 + 2 * 2) + 2 * 2 * 5 + 40 / 32 + 2 * 8


@pytest.mark.parametrize(
    ("layer", "recompute", "numbers"),
    [
        ("M", [], NORM + SCAN + 3 * 8),  # and the gated norm
        ("*", [], NORM + 4 * 12 + 12 + 4),
        ("-", [], NORM + 2 * 7),
        ("-", ["mlp"], NORM),
        # scores of 6 experts twice, their order in int64; 8 numbers about each of 2 chosen ones
        ("E", [], NORM + 2 * 11 + 2 * (8 + 2 * 9) + 8 + 4 * 6 + 8 * 2),
        ("E", ["shared_experts"], NORM + 2 * (8 + 2 * 9) + 8 + 4 * 6 + 8 * 2),
        ("E", ["moe"], NORM),
    ],
)
def test_activations_of_a_layer_by_hand(layer: str, recompute: list[str], numbers: float):
    assert cpu_layer_activations(HAND, layer, recompute) == 4 * numbers


def test_a_scan_in_bf16_is_computed_in_fp32():
    in_bf16 = HAND.model_copy(update={"precision": "bf16"})
    norms = 4 * 2 * 10 + 2 * 10 + 4 * 2 * 8 + 2 * 8  # what the layers after them take is bf16
    assert cpu_layer_activations(in_bf16, "M", []) == norms + 4 * SCAN


def test_layers_that_are_computed_again_are_whole_one_by_one():
    model = HAND.model_copy(update={"hybrid_layer_pattern": "M--", "mtp_num_layers": 0})
    run = Run(micro_batch_size=3, recompute=["layer"])
    largest = cpu_layer_activations(model, "M", [])
    assert cpu_activation_memory(work(model, run)) == [288 * (3 * 4 * 10 + largest)]
    many = 10_000  # whose logits are more than a layer
    (kept,) = cpu_activation_memory(work(model, run, vocab_size=many))
    assert kept == 288 * (3 * 4 * 10 + 4 * many + 4 * NORM)


def test_a_stage_computes_the_layers_of_one_micro_batch_again_however_many_are_under_way():
    model = HAND.model_copy(update={"hybrid_layer_pattern": "M-" * 3, "mtp_num_layers": 0})
    pipeline = Parallel(pipeline_model_parallel_size=3, pipeline_split="layers")
    run = Run(micro_batch_size=3, recompute=["layer"], parallel=pipeline)
    largest, inputs = cpu_layer_activations(model, "M", []), 2 * 4 * 10
    expected = [288 * (n * inputs + largest) for n in (3, 2, 1)]
    assert cpu_activation_memory(work(model, run)) == expected


def test_a_plan_without_gpus_counts_what_a_cpu_keeps():
    """54 MB on a GPU, 82 on a CPU; a step was measured to take 83."""
    on_gpu, on_cpu = (load({"cluster": {"gpus_per_node": gpus}}, {}) for gpus in (1, 0))
    found = [memory_of(config, config.training("sft")).activations / 1e6 for config in (on_gpu, on_cpu)]
    assert found == [pytest.approx(54.5, abs=0.1), pytest.approx(82.0, abs=0.1)]
