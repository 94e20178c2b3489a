"""Numbers of parameters against models that megatron-core builds, published numbers, and sums by hand."""

from snaketron.config import Model
from snaketron.sizes import parameters
from tests.unit.sizes.built_sizes import VOCABULARY
from tests.unit.sizes.models import SMALL, SUPER, VOCABULARY_OF_SUPER

import pytest


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


def test_parameters_of_nemotron_3_super_are_the_published_ones():
    # The Hugging Face checkpoint has 123,611,033,088 elements, multi-token prediction included; 41 routers
    # (40 layers and the block of multi-token prediction) keep a bias of 512 experts that is no parameter.
    total = parameters.num_parameters(SUPER, VOCABULARY_OF_SUPER).total
    assert total + 41 * 512 == 123_611_033_088
    # "120.6B" without multi-token prediction, "12.7B active".
    assert total - parameters.mtp_parameters(SUPER).total == 120_668_687_360
    assert parameters.num_active_parameters(SUPER, VOCABULARY_OF_SUPER) == 12_770_216_960
