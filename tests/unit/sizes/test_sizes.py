"""Sizes against models that megatron-core builds, published numbers, and sums by hand."""

import json

from snaketron.config import Adapters, Model, Optimizer, Parallel, Run
from snaketron.sizes import flops, memory, parameters
from tests.conftest import run_module
from tests.unit.sizes.built_sizes import ADAPTERS, LAYOUTS, VOCABULARY

import pytest

SUPER = Model(
    hybrid_layer_pattern="MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
    hidden_size=4096,
    num_attention_heads=32,
    num_query_groups=2,
    kv_channels=128,
    mamba_num_heads=128,
    mamba_head_dim=64,
    mamba_num_groups=8,
    mamba_state_dim=128,
    num_moe_experts=512,
    moe_router_topk=22,
    moe_ffn_hidden_size=2688,
    moe_latent_size=1024,
    moe_shared_expert_intermediate_size=5376,
    precision="bf16",
)
VOCABULARY_OF_SUPER = 131072


@pytest.mark.parametrize(
    ("stages", "expected"),
    [(1, "MEM*EME"), (2, "MEM*|EME"), (3, "MEM|*E|ME"), (7, "M|E|M|*|E|M|E")],
)
def test_pipeline_stages_are_even_and_the_first_ones_longer(stages, expected):
    assert parameters.pipeline_pattern("MEM*EME", stages) == expected


def test_more_stages_than_layers_is_an_error_that_names_both():
    with pytest.raises(ValueError, match=r"'ME' has 2 layers.*pipeline_model_parallel_size 3"):
        parameters.pipeline_pattern("ME", 3)


def test_vocabulary_is_padded_for_every_tensor_parallel_rank():
    model = Model(make_vocab_size_divisible_by=128)
    assert parameters.padded_vocab_size(model, 2048, 1) == 2048
    assert parameters.padded_vocab_size(model, 2049, 4) == 2176  # the same for each TP that divides 128, ...
    assert parameters.padded_vocab_size(model, 2049, 3) == 2304  # ... and 6 * 384 for one that does not


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"mtp_num_layers": 0},
        {"moe_latent_size": None, "hybrid_layer_pattern": "M-E*", "ffn_hidden_size": 96},
        {"mtp_hybrid_layer_pattern": "M", "mtp_num_layers": 1, "mamba_num_groups": 4, "hidden_size": 64},
        {"hybrid_layer_pattern": "EE", "num_moe_experts": 5, "make_vocab_size_divisible_by": 7},
    ],
)
def test_a_model_has_the_parameters_that_are_predicted(build, keys):
    built = build(vocab_size=VOCABULARY, **keys)
    expected = parameters.num_parameters(Model(**keys), VOCABULARY)
    assert sum(p.numel() for p in built.parameters()) == expected.total
    experts = sum(p.numel() for name, p in built.named_parameters() if ".experts." in name)
    assert experts == expected.expert


def test_each_process_of_a_layout_holds_what_is_predicted():
    found = json.loads(run_module("tests.unit.sizes.built_sizes", processes=2).output.splitlines()[-1])
    for layout, keys in LAYOUTS.items():
        parallel = Parallel(**keys)
        stages = parameters.stage_parameters(Model(), VOCABULARY, parallel)
        adapters = parameters.adapter_parameters(Model(), parallel, ADAPTERS)
        for rank, numbers in enumerate(found[layout]):
            # With two stages the second process is the second stage; otherwise both hold the same amount.
            stage = stages[rank % len(stages)]
            added = adapters[rank % len(stages)]
            expected = [
                number
                for part in (stage, added)
                for number in (part.dense_of_process(parallel), part.expert_of_process(parallel))
            ]
            assert numbers == expected, (layout, rank)


def test_parameters_of_nemotron_3_super_are_the_published_ones():
    # The Hugging Face checkpoint has 123,611,033,088 elements, multi-token prediction included; 41 routers
    # (40 layers and the block of multi-token prediction) keep a bias of 512 experts that is no parameter.
    total = parameters.num_parameters(SUPER, VOCABULARY_OF_SUPER).total
    assert total + 41 * 512 == 123_611_033_088
    # "120.6B" without multi-token prediction, "12.7B active".
    assert total - parameters.mtp_parameters(SUPER).total == 120_668_687_360
    assert parameters.num_active_parameters(SUPER, VOCABULARY_OF_SUPER) == 12_770_216_960


HAND = Model(
    hidden_size=10,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=3,
    ffn_hidden_size=7,
    mamba_num_heads=2,
    mamba_head_dim=4,
    mamba_num_groups=1,
    mamba_state_dim=5,
    num_moe_experts=6,
    moe_router_topk=2,
    moe_ffn_hidden_size=9,
    moe_latent_size=8,
    moe_shared_expert_intermediate_size=11,
    make_vocab_size_divisible_by=16,
)


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        # in_proj 10 -> z 8, x 8, B 5, C 5, dt 2; out_proj 8 -> 10; state of 8 x 5 numbers
        ("M", 2 * (10 * 28 + 8 * 10) + 7 * 8 * 5),
        # query 12, key 6, value 6; output 12 -> 10; 50 of 100 keys, two products of width 12
        ("*", 2 * (10 * 24 + 12 * 10) + 2 * 2 * 12 * 50),
        ("-", 2 * (10 * 7 + 7 * 10)),
        # router to 6, latent 10 -> 8 -> 10, two experts 8 -> 9 -> 8, shared 10 -> 11 -> 10
        ("E", 2 * (10 * 6 + 2 * 10 * 8 + 2 * 2 * 8 * 9 + 2 * 10 * 11)),
    ],
)
def test_flops_of_a_layer_by_hand(layer, expected):
    assert flops.layer_flops(HAND, layer, 100) == expected


def test_flops_of_training_by_hand():
    # Two layers, an output layer of 32 rows, and twice: the joining projection 20 -> 10, a layer, the output.
    model = HAND.model_copy(
        update={"hybrid_layer_pattern": "M-", "mtp_hybrid_layer_pattern": "-", "mtp_num_layers": 2}
    )
    mamba, mlp, output = 2 * (10 * 28 + 8 * 10) + 7 * 8 * 5, 280, 2 * 10 * 32
    forward = mamba + mlp + output + 2 * (2 * 20 * 10 + mlp + output)
    assert flops.training_flops(model, 30, 100) == 3 * forward


def test_memory_by_hand():
    # One MLP layer: 2 x 10 x 7 weights and a norm of 10; embedding and output of 16 rows, a final norm.
    keys = {"hybrid_layer_pattern": "-", "mtp_num_layers": 0, "precision": "bf16"}
    model = HAND.model_copy(update=keys)
    sharded, replicated = 140 + 2 * 160, 20
    parallel = Parallel(tensor_model_parallel_size=2, data_parallel_size=2)
    (found,) = memory.static_memory(model, 16, parallel)
    mine = sharded / 2 + replicated
    assert found == memory.StaticMemory(
        weights=2 * mine, gradients=4 * mine, main_weights=4 * mine / 2, moments=8 * mine / 2
    )
    assert found.total == 12 * mine


def test_memory_of_experts_is_divided_by_their_own_copies():
    # Eight processes, experts over four of them: two copies of each expert, eight of all else.
    keys = {"hybrid_layer_pattern": "E", "mtp_num_layers": 0, "precision": "bf16", "num_moe_experts": 8}
    model = HAND.model_copy(update=keys)
    parallel = Parallel(data_parallel_size=8, expert_model_parallel_size=4)
    (found,) = memory.static_memory(model, 16, parallel)
    experts = 2 * 2 * 8 * 9  # two of the eight
    dense = 10 * 8 + 2 * 10 * 8 + 2 * 10 * 11 + 10 + 2 * 160 + 10
    assert found.weights == 2 * (experts + dense)
    assert found.moments == 8 * (experts / 2 + dense / 8)


def test_a_model_in_fp32_has_no_main_weights():
    (found,) = memory.static_memory(Model(), 512, Parallel())
    assert (found.main_weights, found.weights) == (0, found.gradients)


def test_the_last_stage_holds_a_copy_of_the_embedding_for_multi_token_prediction():
    two = Parallel(pipeline_model_parallel_size=2)
    table = 512 * 128
    for depths, copies in ((0, 1), (1, 2)):
        model = Model(mtp_num_layers=depths, hybrid_layer_pattern="--", mtp_hybrid_layer_pattern="-")
        mlp = parameters.layer_parameters(model, "-").total
        block = depths * (2 * 128 * 128 + 3 * 128 + mlp)
        first, last = (stage.total for stage in parameters.stage_parameters(model, 512, two))
        assert first == mlp + table
        assert last == mlp + 128 + block + copies * table


@pytest.mark.parametrize(
    ("layer", "recompute", "expected"),
    [
        # norm in and out; z 8, x 8, B 5, C 5, dt 2; scan, gate and norm of width 8
        ("M", [], 2 * 10 + 28 + 3 * 8),
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
    assert memory.layer_activations(HAND, layer, 1, recompute) == expected
    assert memory.layer_activations(HAND, layer, 2, recompute) == expected / 2


def test_activations_of_pipeline_stages_by_hand():
    # Two stages of an MLP layer each, the last with logits of 32 and one depth of prediction with 32 more.
    keys = {"hybrid_layer_pattern": "--", "mtp_hybrid_layer_pattern": "-", "mtp_num_layers": 1}
    model = HAND.model_copy(update=keys | {"precision": "bf16"})
    run = Run(micro_batch_size=3, parallel=Parallel(pipeline_model_parallel_size=2))
    mlp = 2 * 10 + 2 * 7
    first, last = memory.activation_memory(model, 30, 100, run)
    assert first == 2 * 300 * mlp * 2  # two micro-batches under way
    assert last == 2 * 300 * (mlp + 32 + 6 * 10 + mlp + 32)


def test_lower_precision_and_offloading_leave_less_on_the_gpu():
    model = HAND.model_copy(update={"hybrid_layer_pattern": "-", "mtp_num_layers": 0, "precision": "bf16"})
    mine = 140 + 2 * 160 + 20
    short = Optimizer(gradient_precision="bf16", moment_precision="bf16")
    (found,) = memory.static_memory(model, 16, Parallel(), short)
    assert found.total == (2 + 2 + 2 + 4) * mine
    (found,) = memory.static_memory(model, 16, Parallel(), Optimizer(), 0.75)
    assert found.total == (2 + 4 + 12 / 4) * mine


# Of tests/benchmarks/gpu_training.py, measured in bf16 (docs/measurements.md): peak GiB in tensors.
MEASURED = Model(
    hybrid_layer_pattern="MEMEM*EMEMEM*EMEMEM*EMEME",
    hidden_size=2048,
    num_attention_heads=16,
    kv_channels=128,
    mamba_num_heads=64,
    mamba_head_dim=64,
    mamba_num_groups=8,
    mamba_state_dim=128,
    num_moe_experts=64,
    moe_router_topk=6,
    moe_ffn_hidden_size=1344,
    moe_latent_size=512,
    moe_shared_expert_intermediate_size=2688,
    precision="bf16",
)


BF16_STATE = Optimizer(gradient_precision="bf16", moment_precision="bf16")
TWO = {
    "tensor_model_parallel_size": 37.6,
    "pipeline_model_parallel_size": 47.7,
    "context_parallel_size": 40.5,
    "data_parallel_size": 56.4,
}


@pytest.mark.parametrize(
    ("run", "optimizer", "peak_gib"),
    [
        ({"micro_batch_size": 1}, Optimizer(), 44.4),
        ({"micro_batch_size": 4}, Optimizer(), 68.2),
        ({"micro_batch_size": 8}, Optimizer(), 100.1),
        ({"recompute": ["moe"]}, Optimizer(), 61.3),
        ({"recompute": ["layer"]}, Optimizer(), 50.6),
        ({"offload_optimizer": 0.5}, Optimizer(), 58.3),
        ({}, BF16_STATE, 52.4),
        *(({"parallel": {name: 2}}, Optimizer(), peak) for name, peak in TWO.items()),
        (
            {"parallel": {"expert_model_parallel_size": 2, "data_parallel_size": 2}},
            Optimizer(),
            53.8,
        ),
    ],
)
def test_the_estimate_is_near_what_was_measured(run, optimizer, peak_gib):
    estimate = memory.memory_of_process(MEASURED, 131072, 4096, Run(**run), optimizer)
    assert estimate / 2**30 == pytest.approx(peak_gib, rel=0.06)


def test_adapters_of_lora_by_hand():
    """Rank 2 on an attention layer of 16 queries, keys and values of 8 each, and on 4 experts of 6 x 10."""
    model = Model(
        hybrid_layer_pattern="*E",
        hidden_size=12,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=4,
        num_moe_experts=4,
        moe_latent_size=6,
        moe_ffn_hidden_size=10,
        mtp_num_layers=0,
    )
    adapters = Adapters(rank=2, expert_rank=1, target_modules=["linear_qkv", "experts.linear_fc2"])
    (stage,) = parameters.adapter_parameters(model, Parallel(), adapters)
    # linear_qkv: 12 inputs whole, 16 + 8 + 8 outputs divided. Experts: 10 inputs, 6 outputs.
    assert stage == parameters.Parameters(tensor=2 * 32, replicated=2 * 12, expert=4 * (10 + 6))
    assert stage.dense_of_process(Parallel(tensor_model_parallel_size=2)) == 32 + 24


def test_lora_keeps_gradients_and_optimizer_of_its_adapters_alone():
    """In bf16: 2 bytes a frozen weight, and 2 + 4 + 4 + 8 bytes a trained one."""
    model, vocabulary = Model(precision="bf16"), 512
    adapters = Adapters(rank=4)
    base = parameters.num_parameters(model, vocabulary).total
    (added,) = parameters.adapter_parameters(model, Parallel(), adapters)
    (kept,) = memory.static_memory(model, vocabulary, Parallel(), adapters=adapters)
    assert (kept.weights, kept.gradients) == (2 * (base + added.total), 4 * added.total)
    assert kept.total == 2 * base + 18 * added.total


def test_lora_of_nemotron_3_super_fits_where_full_fine_tuning_does_not():
    """On 8 GPUs of 80 GB with EP 8: 46 GB on each, of which 44 are the frozen weights, instead of 320."""
    parallel = Parallel(expert_model_parallel_size=8, data_parallel_size=8)
    adapters = Adapters(rank=32, expert_rank=2)
    (full,) = memory.static_memory(SUPER, VOCABULARY_OF_SUPER, parallel)
    (lora,) = memory.static_memory(SUPER, VOCABULARY_OF_SUPER, parallel, adapters=adapters)
    print(f"full {full.total / 1e9:.1f} GB, LoRA {lora.total / 1e9:.1f} GB")
    assert lora.total < 80e9 < full.total
