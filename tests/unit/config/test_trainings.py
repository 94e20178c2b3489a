"""The list of trainings: names, values, and where the configuration has them."""

from __future__ import annotations

from dataclasses import replace

from snaketron.config import Config, ConfigError, Parallel, load
from snaketron.config.training_checks import check_training
from snaketron.settings.training import run_settings, train_settings

import pytest


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


def test_a_phase_may_differ_in_layout_batch_precision_and_how_it_is_run():
    """As long context does: what it does not say is as in `pretrain` and `model`."""
    mix = [{"corpus": "docs", "weight": 1}]
    long = {
        "parallel": {"context_parallel_size": 2},
        "seq_length": 1024,
        "global_batch_size": 8,
        "micro_batch_size": 1,
        "precision": "bf16",
        "recompute": ["moe"],
        "save_interval": 20,
    }
    phases = [
        {"name": n, "tokens": 300_000, "blend": mix} | keys for n, keys in (("short", {}), ("long", long))
    ]
    config = load(
        {"pretrain": {"phases": phases, "parallel": {"data_parallel_size": 2}, "global_batch_size": 8}}, {}
    )
    short, found = config.trainings()[:2]
    assert short.run == config.pretrain and short.model == config.model
    parallel = found.run.parallel
    assert (parallel.context_parallel_size, parallel.data_parallel_size) == (2, 2)
    assert (found.model.precision, short.model.precision) == ("bf16", "fp32")
    assert (found.run.micro_batch_size, found.run.recompute, found.run.save_interval) == (1, ["moe"], 20)
    assert found.at("parallel") == "pretrain.phases[1].parallel"
    assert found.at("eval_interval") == "pretrain.eval_interval"
    run = run_settings(config, "pretrain/long")
    assert (run.parallel, run.recompute, run.save_interval) == (parallel, ["moe"], 20)
    assert train_settings(config, "pretrain/long").model.precision == "bf16"
    assert train_settings(config, "sft").model.precision == "fp32"


def test_the_layout_of_a_phase_is_checked_at_its_place():
    mix = [{"corpus": "docs", "weight": 1}]
    phase = {"name": "long", "tokens": 300_000, "blend": mix, "parallel": {"tensor_model_parallel_size": 3}}
    with pytest.raises(ConfigError) as error:
        load({"pretrain": {"phases": [phase]}}, {})
    assert str(error.value).splitlines()[0] == (
        "model.num_attention_heads 4 is not divisible by "
        "pretrain.phases[0].parallel.tensor_model_parallel_size 3"
    )


def test_a_phase_with_a_rate_of_its_own_is_passed_over_by_the_schedule():
    """1,000 tokens a step: warm-up and decay of the phases around it meet as if it were not there."""
    mix = [{"corpus": "docs", "weight": 1}]
    phases = [
        {"name": "one", "tokens": 200_000, "blend": mix},
        {"name": "flat", "tokens": 50_000, "blend": mix, "learning_rate": 1e-5},
        {"name": "two", "tokens": 100_000, "blend": mix},
    ]
    keys = {"seq_length": 250, "global_batch_size": 4, "warmup_tokens": 10_000, "decay_tokens": 60_000}
    config = load({"pretrain": {"phases": phases, **keys}}, {})
    one, flat, two = (train_settings(config, f"pretrain/{name}") for name in ("one", "flat", "two"))
    assert (one.schedule.start, two.schedule.start, two.schedule.end) == (0, 200_000, 300_000)
    assert (two.schedule.style, two.schedule.decay) == ("WSD", 60_000)
    assert (flat.schedule.style, flat.schedule.warmup) == ("constant", 0)
    assert (flat.optimizer.learning_rate, one.optimizer.learning_rate) == (1e-5, 3e-3)
    with pytest.raises(
        ConfigError, match=r"more than the 300000 tokens of all phases without a learning_rate"
    ):
        load({"pretrain": {"phases": phases, **keys, "decay_tokens": 300_000}}, {})


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
        "model.num_attention_heads 4 is not divisible by "
        "pretrain.phases[1].parallel.tensor_model_parallel_size 3"
    )
