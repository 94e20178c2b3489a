"""Variables of the environment and words of --config that set keys."""

from __future__ import annotations

from snaketron.config import load
from tests.unit.config.refusals import refusal

import pytest


def test_the_environment_is_over_every_file():
    environment = {"SNAKETRON_SFT__TRAIN_ITERS": "11", "SNAKETRON_TRACKING": "off", "HOME": "/root"}
    config = load({"sft": {"train_iters": 50, "num_samples": 3}}, environment)
    assert (config.sft.train_iters, config.sft.num_samples, config.tracking) == (11, 3, "off")


def test_the_environment_can_give_a_list():
    blend = "[{source: tools, weight: 2}]"
    config = load({}, {"SNAKETRON_SFT__BLEND": blend})
    assert [(s.source, s.weight) for s in config.sft.blend] == [("tools", 2.0)]


def test_a_section_in_the_environment_is_merged_as_that_of_a_file():
    """It took the place of all keys that files had given there."""
    config = load({"sft": {"train_iters": 50, "num_samples": 3}}, {"SNAKETRON_SFT": "{train_iters: 11}"})
    assert (config.sft.train_iters, config.sft.num_samples) == (11, 3)


def test_the_variable_that_asks_for_plain_lines_is_no_key():
    assert load({}, {"SNAKETRON_PLAIN": "1"}) == load({}, {})


def test_the_environment_does_not_change_what_was_given():
    values = {"sft": {"train_iters": 50}}
    load(values, {"SNAKETRON_SFT__TRAIN_ITERS": "11"})
    assert values == {"sft": {"train_iters": 50}}


def test_a_value_of_the_command_line_is_what_a_file_would_have():
    """Snakemake gives text for each value in a section or list, and takes `false` for a text that is true."""
    words = [
        "sft_data={template_arguments: {enable_thinking: false, budget: 3, name: null}, pack_size: 64}",
        "cluster={container: null}",
        "tracking=off",
        "seed=7",
    ]
    of_snakemake = {
        "sft_data": {
            "template_arguments": {"enable_thinking": "false", "budget": "3", "name": "null", "kept": True},
            "pack_size": "64",
        },
        "cluster": {"container": "null", "gpus_per_node": 8},
        "tracking": "off",
        "seed": 7,
    }
    config = load(of_snakemake, {}, words)
    assert config.sft_data.template_arguments == {
        "enable_thinking": False,
        "budget": 3,
        "name": None,
        "kept": True,  # of a file
    }
    assert (config.sft_data.pack_size, config.tracking, config.seed) == (64, "off", 7)
    assert (config.cluster.container, config.cluster.gpus_per_node) == (None, 8)


def test_the_environment_is_over_the_command_line():
    words = ["sft={train_iters: 50, num_samples: 3}"]
    config = load({"sft": {"train_iters": "50"}}, {"SNAKETRON_SFT__TRAIN_ITERS": "11"}, words)
    assert (config.sft.train_iters, config.sft.num_samples) == (11, 3)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "SNAKETRON_SFT__TRAIN_ITER",
            "1",
            "sft.train_iter: unknown key; did you mean 'train_iters'? "
            "(environment variable SNAKETRON_SFT__TRAIN_ITER)",
        ),
        (
            "SNAKETRON_STF__TRAIN_ITERS",
            "1",
            "stf: unknown key; did you mean 'sft'? (environment variable SNAKETRON_STF__TRAIN_ITERS)",
        ),
        (
            "SNAKETRON_SEED__X",
            "1",
            "environment variable SNAKETRON_SEED__X: 'seed' is not a section",
        ),
        (
            "SNAKETRON_SFT__TRAIN_ITERS",
            "many",
            "sft.train_iters: input should be a valid integer, unable to parse string as an integer "
            "(it is 'many') (environment variable SNAKETRON_SFT__TRAIN_ITERS)",
        ),
        (  # one underscore where two belong: it was "did you mean 'sft_data'?"
            "SNAKETRON_SFT_TRAIN_ITERS",
            "1",
            "environment variable SNAKETRON_SFT_TRAIN_ITERS: two underscores divide sections and keys: "
            "SNAKETRON_SFT__TRAIN_ITERS",
        ),
        (
            "SNAKETRON_SFT__PARALLEL_TENSOR_MODEL__PARALLEL_SIZE",
            "1",
            "two underscores divide sections and keys: SNAKETRON_SFT__PARALLEL__TENSOR_MODEL_PARALLEL_SIZE",
        ),
        ("SNAKETRON_SFT", "{1: 2}", "sft.1: unknown key; known: "),
        ("SNAKETRON_SEED", "[1", "environment variable SNAKETRON_SEED: '[1' is not YAML"),
    ],
)
def test_a_wrong_variable_is_named(name, value, message):
    assert message in refusal({"seed": 1}, **{name: value})


@pytest.mark.parametrize("values", [{"sft": {"train_iter": 1}}, {"sft": {"warmup_iters": 9000}}])
def test_a_variable_is_not_named_for_what_a_file_says(values):
    assert "environment variable" not in refusal(values, SNAKETRON_SFT__NUM_SAMPLES="1")
    assert "environment variable" not in refusal(values, SNAKETRON_SFT="{num_samples: 1}")


def test_of_a_section_in_the_environment_each_key_is_named():
    said = refusal({}, SNAKETRON_SFT="{train_iters: many, optimizer: {lr: high}}").splitlines()
    assert [line.partition(":")[0] for line in said] == ["sft.train_iters", "sft.optimizer.lr"]
    assert all(line.endswith("(environment variable SNAKETRON_SFT)") for line in said)
