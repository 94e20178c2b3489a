"""The list of trainings: names, values, and where the configuration has them."""

from __future__ import annotations

from dataclasses import replace

from snaketron.config import Config, Parallel, load
from snaketron.config.checks import check_training


def test_the_trainings_in_the_order_in_which_they_run():
    config = Config()
    found = config.trainings()
    assert [training.name for training in found] == ["pretrain/broad", "pretrain/focused", "sft", "lora"]
    assert [training.section for training in found] == ["pretrain", "pretrain", "sft", "lora"]
    assert [training.packed for training in found] == [False, False, True, True]
    assert [training.on_request for training in found] == [False, False, False, True]
    assert [training.adapters for training in found] == [None, None, None, config.lora]


def test_a_phase_has_the_values_of_pretraining_and_its_own():
    """Message paths name the key that counts: 3 x 20 x 50 tokens of the phase's own, 3 x 12 x 100 else."""
    mix = [{"corpus": "docs", "weight": 1}]
    phases = [
        {"name": "own", "tokens": 2_500, "blend": mix, "seq_length": 50, "global_batch_size": 20},
        {"name": "shared", "tokens": 3_000, "blend": mix},
    ]
    keys = {"seq_length": 100, "global_batch_size": 12, "warmup_tokens": 0, "decay_tokens": 0}
    config = load({"pretrain": {"phases": phases, **keys}}, {})
    own, shared, *_ = config.trainings()
    assert (own.tokens, shared.tokens) == (3_000, 3_600)
    assert own.at("seq_length") == "pretrain.phases[0].seq_length"
    assert shared.at("seq_length") == "pretrain.seq_length"
    assert own.at("parallel") == shared.at("parallel") == "pretrain.parallel"
    assert own.run.seq_length == 50 and config.pretrain.seq_length == 100


def test_tunings_are_as_long_as_packs():
    config = load({"sft_data": {"pack_size": 512}, "sft": {"train_iters": 20, "global_batch_size": 4}}, {})
    sft = config.training("sft")
    assert (sft.seq_length, sft.tokens) == (512, 20 * 4 * 512)
    assert sft.at("seq_length") == "sft_data.pack_size" and sft.at("optimizer") == "sft.optimizer"


def test_a_message_names_the_place_of_a_value_that_a_training_has_for_itself():
    config = Config()
    second = config.trainings()[1]
    run = second.run.model_copy(update={"parallel": Parallel(tensor_model_parallel_size=3)})
    own = replace(second, run=run, elsewhere={"parallel": "pretrain.phases[1].parallel"})
    assert check_training(second, config) == []
    assert check_training(own, config)[0] == (
        "model.num_attention_heads 8 is not divisible by "
        "pretrain.phases[1].parallel.tensor_model_parallel_size 3"
    )
