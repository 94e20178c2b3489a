"""The published names: those of NVIDIA's index, and each number of Megatron's tensors once."""

from __future__ import annotations

from pathlib import Path

from snaketron.config import Model, load
from snaketron.huggingface.names import Part, megatron_tensors, tensors
from snaketron.sizes.parameters import num_parameters
from tests.unit.huggingface.checkpoints import MODEL, TOKENS

import yaml

SUPER = load(yaml.safe_load((Path(__file__).parents[3] / "config/super.yaml").read_text()), {}).model


def test_the_published_index_of_nemotron_3_super_is_computed_from_its_configuration():
    """Its index lists 42,683 tensors of 123,611,033,088 numbers in 247,222,108,160 bytes.

    The 41 biases of the routers are in fp32.
    """
    found = tensors(SUPER, 131_072)
    assert len({tensor.name for tensor in found}) == len(found) == 42_683
    assert sum(tensor.numbers for tensor in found) == 123_611_033_088
    assert sum(tensor.numbers * (4 if tensor.fp32 else 2) for tensor in found) == 247_222_108_160
    assert [tensor.name for tensor in found if tensor.fp32][
        -1
    ] == "mtp.layers.1.mixer.gate.e_score_correction_bias"
    assert sum(tensor.fp32 for tensor in found) == 41


def test_some_published_shapes_of_nemotron_3_super():
    shapes = {tensor.name: tensor.shape for tensor in tensors(SUPER, 131_072)}
    assert shapes["backbone.embeddings.weight"] == (131072, 4096)
    # 2 x 8,192 for z and x, 2 x 8 x 128 for B and C, 128 heads
    assert shapes["backbone.layers.0.mixer.in_proj.weight"] == (18560, 4096)
    assert shapes["backbone.layers.0.mixer.conv1d.weight"] == (10240, 1, 4)
    assert shapes["backbone.layers.7.mixer.k_proj.weight"] == (256, 4096)
    assert shapes["backbone.layers.1.mixer.experts.511.up_proj.weight"] == (2688, 1024)
    assert shapes["mtp.layers.0.eh_proj.weight"] == (4096, 8192)
    assert shapes["mtp.layers.1.final_layernorm.weight"] == (4096,)


def test_queries_keys_and_values_are_taken_from_each_group():
    """4 heads of 4 in 2 groups: rows 0 to 7 are queries, 8 to 11 the key, 12 to 15 the value of the first."""
    parts = {t.name.split(".")[-2]: t.parts for t in tensors(MODEL, TOKENS) if "layers.2.mixer" in t.name}
    key = "decoder.layers.2.self_attention.linear_qkv.weight"
    assert parts["q_proj"] == (Part(key, 0, 8), Part(key, 16, 24))
    assert parts["k_proj"] == (Part(key, 8, 12), Part(key, 24, 28))
    assert parts["v_proj"] == (Part(key, 12, 16), Part(key, 28, 32))


def test_every_number_of_a_model_is_published_once():
    for model in (MODEL, Model(), Model(moe_latent_size=None, mtp_num_layers=0)):
        published = tensors(model, TOKENS)
        covered: dict[tuple[str, int | None], list[tuple[int, int]]] = {}
        for tensor in published:
            for part in tensor.parts:
                covered.setdefault((part.key, part.expert), []).append((part.start, part.stop))
        for tensor in megatron_tensors(published, {}):
            rows = tensor.shape[0] if tensor.expert is None else tensor.shape[1]
            spans = sorted(covered[tensor.key, tensor.expert])
            assert [0, *(stop for _, stop in spans)] == [*(start for start, _ in spans), rows]
        biases = sum(tensor.numbers for tensor in published if tensor.fp32)
        assert sum(t.numbers for t in published) - biases == num_parameters(model, TOKENS).total - (
            2 * (256 - TOKENS) * model.hidden_size
        )
