"""The layers and the parameters of pipeline stages."""

import itertools
import json
import random

from snaketron.config import Adapters, Model, Parallel
from snaketron.sizes import parameters
from snaketron.sizes.compute import LAYER_ON_HOST, layer_seconds
from snaketron.sizes.gpus import GPUS
from snaketron.sizes.stages import (
    adapter_parameters,
    balanced_ends,
    even_ends,
    host_costs,
    layer_costs,
    pipeline_stages,
    stage_parameters,
)
from tests.benchmarks.shapes import NANO
from tests.conftest import run_module
from tests.unit.sizes.built_sizes import ADAPTERS, LAYOUTS, MODEL, VOCABULARY
from tests.unit.sizes.models import SUPER, VOCABULARY_OF_SUPER

import pytest


def by(split: str, stages: int) -> Parallel:
    return Parallel(pipeline_model_parallel_size=stages, pipeline_split=split)


def times(costs: tuple[int, ...], ends: tuple[int, ...]) -> list[int]:
    return [sum(costs[start:end]) for start, end in itertools.pairwise([0, *ends])]


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        (1, ["MEM*EME"]),
        (2, ["MEM*", "EME"]),
        (3, ["MEM", "*E", "ME"]),
        (7, ["M", "E", "M", "*", "E", "M", "E"]),
    ],
)
def test_stages_by_layers_are_even_and_the_first_ones_longer(stages, expected):
    model = Model(hybrid_layer_pattern="MEM*EME")
    assert pipeline_stages(model, 131072, by("layers", stages)) == expected


@pytest.mark.parametrize("split", ["time", "layers"])
def test_more_stages_than_layers_is_an_error_that_names_both(split):
    with pytest.raises(ValueError, match=r"'ME' has 2 layers.*pipeline_model_parallel_size 3"):
        pipeline_stages(Model(hybrid_layer_pattern="ME"), 512, by(split, 3))


@pytest.mark.parametrize(
    ("costs", "stages", "ends"),
    [
        ((1, 1, 1, 1), 2, (2, 4)),
        ((1, 1, 1, 4), 2, (3, 4)),  # 3 and 4; 2 and 5 by layers
        ((3, 1, 1, 1, 1, 1), 2, (2, 6)),  # 4 and 4
        ((1, 1, 1, 1, 9), 3, (2, 4, 5)),  # the last layer alone, and the others alike
        ((9, 1, 1), 3, (1, 2, 3)),  # each stage has a layer
    ],
)
def test_stages_of_equal_time_by_hand(costs, stages, ends):
    assert balanced_ends(tuple((cost, 0) for cost in costs), stages) == ends


def test_stages_take_equally_long_with_the_host_that_starts_their_kernels():
    """What takes 80 on a GPU and 80 on its host takes 80 x 2 ** (1 / 8) = 87.2; 60 and 80 take 80.9."""
    on_gpu = (20, 20, 20, 20, 70)
    assert balanced_ends(tuple((cost, 0) for cost in on_gpu), 2) == (4, 5)  # 80 and 70
    assert balanced_ends(tuple((cost, 20) for cost in on_gpu), 2) == (4, 5)  # 87.2 and 70; else 62, 90
    assert balanced_ends(tuple((cost, 25) for cost in on_gpu), 2) == (3, 5)  # 76 and 90.1; else 101 and 70


def test_nano_has_stages_that_its_host_starts_as_fast():
    """By the estimate a step takes 3 % less time than with 28 and 24 layers, on an H100 and on an H200."""
    assert [*map(len, pipeline_stages(Model(**NANO), 131072, by("time", 2)))] == [27, 25]


def test_the_host_starts_each_layer_as_fast_and_those_of_multi_token_prediction_with_the_last():
    model = Model(hybrid_layer_pattern="ME", mtp_num_layers=2, mtp_hybrid_layer_pattern="*E")
    each = round(1e15 * LAYER_ON_HOST / 8192)
    assert host_costs(model) == [each, 5 * each]


def test_the_slowest_stage_is_the_fastest_that_there_is():
    """Against all cuts of 400 small pipelines, and never slower than stages of equally many layers."""
    draw = random.Random(7)
    for _ in range(400):
        costs = tuple(draw.randint(1, 9) for _ in range(draw.randint(1, 9)))
        stages = draw.randint(1, len(costs))
        found = times(costs, balanced_ends(tuple((cost, 0) for cost in costs), stages))
        cuts = [
            times(costs, (*inner, len(costs)))
            for inner in itertools.combinations(range(1, len(costs)), stages - 1)
        ]
        least = min(max(one) for one in cuts)
        assert max(found) == least <= max(times(costs, even_ends(len(costs), stages)))
        assert sum(t * t for t in found) == min(sum(t * t for t in one) for one in cuts if max(one) == least)


@pytest.mark.parametrize(
    ("precision", "stages", "layers"),
    [
        ("bf16", 2, [50, 38]),
        ("bf16", 4, [25, 25, 25, 13]),
        ("nvfp4", 2, [52, 36]),  # the last 14 layers stay in bf16, and take longer than the others
        ("nvfp4", 4, [26, 26, 25, 11]),
    ],
)
def test_the_stages_of_nemotron_3_super(precision: str, stages: int, layers: list[int]):
    """As docs/cluster.md and the configurations of GPUs have them."""
    model = SUPER.model_copy(update={"precision": precision, "bf16_layers_at_end": 14})
    assert [*map(len, pipeline_stages(model, VOCABULARY_OF_SUPER, by("time", stages)))] == layers


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_stages_are_the_same_with_every_tensor_parallelism(size: int):
    """With TP 8 the vocabulary of 8,192 has 65,536 rows, and its output layer takes three layers' time."""
    model = Model(
        hybrid_layer_pattern="------",
        precision="bf16",
        hidden_size=8192,
        ffn_hidden_size=8192,
        mtp_num_layers=0,
        make_vocab_size_divisible_by=8192,
    )
    parallel = by("time", 2).model_copy(update={"tensor_model_parallel_size": size})
    assert pipeline_stages(model, 8192, parallel) == ["---", "---"]
    assert pipeline_stages(model, 65536, parallel) == ["-----", "-"]


def test_the_time_of_a_layer_is_that_of_a_token_of_8192_on_an_h100():
    """Whatever the training's length: attention takes the longer, the longer sequences are."""
    model = Model(
        hybrid_layer_pattern="*-",
        precision="bf16",
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
    )
    seconds = layer_seconds(model, "*", 8192, GPUS["h100"], in_bf16=True)
    assert layer_costs(model, 512)[0] == round(1e15 * seconds)


@pytest.mark.parametrize("stages", [2, 4, 8, 16])
def test_stages_of_nemotron_3_super_wait_less_for_each_other(stages):
    costs = tuple(layer_costs(SUPER, VOCABULARY_OF_SUPER))
    ends = [
        tuple(itertools.accumulate(map(len, pipeline_stages(SUPER, VOCABULARY_OF_SUPER, by(split, stages)))))
        for split in ("time", "layers")
    ]
    slowest, before = (max(times(costs, one)) for one in ends)
    # By less than a layer (0.9 to 2 of 164 microseconds) slower than the mean, but for the last one, of 21.
    assert slowest < max(sum(costs) / stages + max(costs[:-1]), costs[-1] + 1)
    assert slowest < 0.91 * before


def test_the_last_layer_takes_what_follows_it_too():
    """By hand, in bf16: an MLP of two matrices of 64 x 256, and an output layer of 500 x 64, at 989 TFLOP/s.

    A layer keeps 2 x 64 + 2 x 256 numbers of 2 bytes, which are read or written five times at 3.35 TB/s.
    """
    model = Model(
        hybrid_layer_pattern="---",
        precision="bf16",
        hidden_size=64,
        ffn_hidden_size=256,
        mtp_num_layers=0,
        make_vocab_size_divisible_by=4,
    )
    layer = 3 * 4 * 64 * 256 / (989e12 * 0.70) + 5 * 2 * (2 * 64 + 2 * 256) / (3.35e12 * 0.8)
    output = 3 * 2 * 64 * 500 / (989e12 * 0.81) + 2.5 * 2 * 500 / (3.35e12 * 0.8)
    assert layer_costs(model, 500) == pytest.approx([1e15 * layer] * 2 + [1e15 * (layer + output)], abs=2)
    # A depth of prediction: an MLP, the output layer again, and what joins both to the decoder.
    joined = 3 * 4 * 64 * 64 / (989e12 * 0.81)
    deeper = model.model_copy(update={"mtp_num_layers": 1, "mtp_hybrid_layer_pattern": "-"})
    last = 1e15 * (2 * layer + 2 * output + joined)
    assert layer_costs(deeper, 500)[-1] == pytest.approx(last, abs=2)


def test_each_process_of_a_layout_holds_what_is_predicted():
    found = json.loads(run_module("tests.unit.sizes.built_sizes", processes=2).output.splitlines()[-1])
    for layout, keys in LAYOUTS.items():
        parallel = Parallel(**keys)
        stages = stage_parameters(MODEL, VOCABULARY, parallel)
        adapters = adapter_parameters(MODEL, VOCABULARY, parallel, ADAPTERS)
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


def test_the_last_stage_holds_a_copy_of_the_embedding_for_multi_token_prediction():
    two = Parallel(pipeline_model_parallel_size=2)
    table = 512 * 128
    for depths, copies in ((0, 1), (1, 2)):
        model = Model(mtp_num_layers=depths, hybrid_layer_pattern="--", mtp_hybrid_layer_pattern="-")
        mlp = parameters.layer_parameters(model, "-").total
        block = depths * (2 * 128 * 128 + 3 * 128 + mlp)
        first, last = (stage.total for stage in stage_parameters(model, 512, two))
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
    (stage,) = adapter_parameters(model, 512, Parallel(), adapters)
    # linear_qkv: 12 inputs whole, 16 + 8 + 8 outputs divided. Experts: 10 inputs, 6 outputs.
    assert stage == parameters.Parameters(tensor=2 * 32, replicated=2 * 12, expert=4 * (10 + 6))
    assert stage.dense_of_process(Parallel(tensor_model_parallel_size=2)) == 32 + 24
