"""Numbers of parameters against models that megatron-core builds, published numbers, and sums by hand."""

import json

from snaketron.config import Adapters, Model, Parallel
from snaketron.sizes import parameters
from tests.conftest import run_module
from tests.unit.sizes.built_sizes import ADAPTERS, LAYOUTS, MODEL, VOCABULARY
from tests.unit.sizes.models import SMALL, SUPER, VOCABULARY_OF_SUPER

import pytest


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
    expected = parameters.num_parameters(Model(**(SMALL | keys)), VOCABULARY)
    assert sum(p.numel() for p in built.parameters()) == expected.total
    experts = sum(p.numel() for name, p in built.named_parameters() if ".experts." in name)
    assert experts == expected.expert


def test_each_process_of_a_layout_holds_what_is_predicted():
    found = json.loads(run_module("tests.unit.sizes.built_sizes", processes=2).output.splitlines()[-1])
    for layout, keys in LAYOUTS.items():
        parallel = Parallel(**keys)
        stages = parameters.stage_parameters(MODEL, VOCABULARY, parallel)
        adapters = parameters.adapter_parameters(MODEL, parallel, ADAPTERS)
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
