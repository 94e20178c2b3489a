"""Memory of a GPU, by hand; `test_published` compares with what was measured."""

from snaketron.config import Lora, Model, Optimizer, Parallel, Run
from snaketron.sizes import memory, parameters
from snaketron.sizes.activations import layer_activations
from snaketron.sizes.stages import adapter_parameters
from tests.unit.sizes.models import HAND, SUPER, VOCABULARY_OF_SUPER, work

import pytest


def test_memory_by_hand():
    # One MLP layer: 2 x 10 x 7 weights and a norm of 10; embedding and output of 16 rows, a final norm.
    keys = {"hybrid_layer_pattern": "-", "mtp_num_layers": 0, "precision": "bf16"}
    model = HAND.model_copy(update=keys)
    sharded, replicated = 140 + 2 * 160, 20
    parallel = Parallel(tensor_model_parallel_size=2, data_parallel_size=2)
    (found,) = memory.static_memory(work(model, Run(parallel=parallel)))
    mine = sharded / 2 + replicated
    assert found == memory.Memory(
        weights=2 * mine, gradients=4 * mine, main_weights=4 * mine / 2, moments=8 * mine / 2
    )
    assert found.total == 12 * mine


def test_memory_of_experts_is_divided_by_their_own_copies():
    # Eight processes, experts over four of them: two copies of each expert, eight of all else.
    keys = {"hybrid_layer_pattern": "E", "mtp_num_layers": 0, "precision": "bf16", "num_moe_experts": 8}
    model = HAND.model_copy(update=keys)
    parallel = Parallel(data_parallel_size=8, expert_model_parallel_size=4)
    (found,) = memory.static_memory(work(model, Run(parallel=parallel)))
    experts = 2 * 2 * 8 * 9  # two of the eight
    dense = 10 * 8 + 2 * 10 * 8 + 2 * 10 * 11 + 10 + 2 * 160 + 10
    assert found.weights == 2 * (experts + dense)
    assert found.moments == 8 * (experts / 2 + dense / 8)


def test_a_model_in_fp32_has_no_main_weights():
    (found,) = memory.static_memory(work(Model()))
    assert (found.main_weights, found.weights) == (0, found.gradients)
    (found,) = memory.static_memory(work(Model(), optimizer=Optimizer(moment_precision="bf16")))
    assert found.main_weights == found.moments == found.weights  # a copy that is not used; twice two bytes


@pytest.mark.parametrize(
    ("layer", "recompute", "expected"),
    [
        # norm in and out; z 8, x 8, B 5, C 5, dt 2; scan, gate and norm of width 8
        ("M", ["scan"], 2 * 10 + 28 + 3 * 8),
        # x, B and C after the convolution; 8 x 5 of a state every 128 tokens; step and decay of 2 heads
        ("M", [], 2 * 10 + 28 + 3 * 8 + 18 + 40 / 128 + 2 * 2),
        ("*", [], 2 * 10 + 2 * 12 + 12),
        ("-", [], 2 * 10 + 2 * 7),
        # shared fc1 and activation of 11; latent 8 in and out; two experts' input 8 and inner 9
        ("E", [], 2 * 10 + 2 * 11 + 2 * 8 + 2 * (8 + 9)),
        ("E", ["shared_experts", "layernorm"], 10 + 2 * 8 + 2 * (8 + 9)),
        ("E", ["moe"], 2 * 10),
        ("M", ["layer"], 10),
    ],
)
def test_activations_of_a_layer_by_hand(layer, recompute, expected):
    assert layer_activations(HAND, layer, 1, recompute) == expected
    assert layer_activations(HAND, layer, 2, recompute) == expected / 2


def test_what_the_scan_of_nemotron_3_nano_keeps_by_hand():
    """In bf16 for 8,192 tokens: 100.7 MB of convolution, 67.1 of states, and 4.2 of step and decay."""
    sizes = {"mamba_num_heads": 64, "mamba_head_dim": 64, "mamba_num_groups": 8, "mamba_state_dim": 128}
    nano = Model(precision="bf16", **sizes)
    keeps, lean = (layer_activations(nano, "M", 1, [], kept) for kept in (True, False))
    assert 2 * 8192 * (keeps - lean) == 2 * 8192 * 6144 + 2 * 64 * 64 * 64 * 128 + 4 * 2 * 64 * 8192


def test_activations_of_pipeline_stages_by_hand():
    # Two stages of an MLP layer each, the last with logits of 32 and one depth of prediction with 32 more.
    keys = {"hybrid_layer_pattern": "--", "mtp_hybrid_layer_pattern": "-", "mtp_num_layers": 1}
    model = HAND.model_copy(update=keys | {"precision": "bf16"})
    run = Run(micro_batch_size=3, parallel=Parallel(pipeline_model_parallel_size=2))
    mlp = 2 * 10 + 2 * 7
    first, last = memory.activation_memory(work(model, run, vocab_size=30, length=100))
    assert first == 2 * 300 * mlp * 2  # two micro-batches under way
    assert last == 2 * 300 * (mlp + 32 + 6 * 10 + mlp + 32)


def test_lower_precision_and_offloading_leave_less_on_the_gpu():
    model = HAND.model_copy(update={"hybrid_layer_pattern": "-", "mtp_num_layers": 0, "precision": "bf16"})
    mine = 140 + 2 * 160 + 20
    short = Optimizer(gradient_precision="bf16", moment_precision="bf16")
    (found,) = memory.static_memory(work(model, optimizer=short))
    assert found.total == (2 + 2 + 2 + 4) * mine
    (found,) = memory.static_memory(work(model, Run(offload_optimizer=0.75)))
    assert found.total == (2 + 4 + 12 / 4) * mine


def test_lora_keeps_gradients_and_optimizer_of_its_adapters_alone():
    """In bf16: 2 bytes a frozen weight, and 2 + 4 + 4 + 8 bytes a trained one."""
    model, vocabulary = Model(precision="bf16"), 512
    adapters = Lora(rank=4)
    base = parameters.num_parameters(model, vocabulary).total
    (added,) = adapter_parameters(model, vocabulary, Parallel(), adapters)
    (kept,) = memory.static_memory(work(model, adapters, vocab_size=vocabulary))
    assert (kept.weights, kept.gradients) == (2 * (base + added.total), 4 * added.total)
    assert kept.total == 2 * base + 18 * added.total


def test_lora_of_nemotron_3_super_fits_where_full_fine_tuning_does_not():
    """On 8 GPUs of 80 GB with EP 8: 46 GB on each, of which 44 are the frozen weights, instead of 320."""
    parallel = Parallel(expert_model_parallel_size=8, data_parallel_size=8)
    runs = Run(parallel=parallel), Lora(rank=32, expert_rank=2, parallel=parallel)
    (full,), (lora,) = (
        memory.static_memory(work(SUPER, run, vocab_size=VOCABULARY_OF_SUPER)) for run in runs
    )
    print(f"full {full.total / 1e9:.1f} GB, LoRA {lora.total / 1e9:.1f} GB")
    assert lora.total < 80e9 < full.total
