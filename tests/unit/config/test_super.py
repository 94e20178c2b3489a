"""The curriculum of config/super.yaml against what was published about it."""

from __future__ import annotations

from pathlib import Path

from snaketron.config import Config, load

import pytest
import yaml


@pytest.fixture(scope="module")
def config() -> Config:
    return load(yaml.safe_load((Path(__file__).parents[3] / "config/super.yaml").read_text()), {})


def test_the_phases_have_the_published_steps(config: Config):
    """20 T and 5 T tokens by 3,072 x 8,192; 34 B and 4 x 4.25 B by 16 x 2^20, at 4K by 4,096 x 4,096."""
    steps = [training.train_iters for training in config.trainings() if training.section == "pretrain"]
    assert steps == [794_729, 198_683, 2_027, 254, 254, 254, 254]
    tokens = {t.global_batch_size * t.seq_length for t in config.trainings()[2:7]}
    assert tokens == {16 * 2**20}


def test_the_blends_have_the_published_weights(config: Config):
    """29, 27 and 28 corpora: 80.4 and 82.9 % of the text, and with 20.7 of long documents 103.6."""
    found = [(len(p.blend), round(sum(e.weight for e in p.blend), 2)) for p in config.pretrain.phases]
    assert found == [(29, 80.4), (27, 82.9)] + 5 * [(28, 103.6)]
    broad, focused = ({e.corpus: e.weight for e in p.blend} for p in config.pretrain.phases[:2])
    assert broad.keys() - focused.keys() == {
        "nemotron_cc_v2_medium_quality",
        "nemotron_cc_v2_1_medium_quality",
    }
    assert (broad["finepdfs"], focused["finepdfs"]) == (6.1, 14.3)
    assert round(sum(entry.weight for entry in config.sft.blend), 2) == 58.3


def test_every_phase_reads_text_in_an_order_of_its_own(config: Config):
    phases = config.pretrain.phases
    assert len({phase.seed or config.seed for phase in phases}) == len(phases)


def test_long_phases_keep_the_rate_at_which_the_decay_ended(config: Config):
    pretrain = config.pretrain
    rates = {phase.learning_rate for phase in pretrain.phases[2:]}
    assert rates == {pretrain.optimizer.min_learning_rate} == {4.5e-6}
    assert pretrain.spans()[-1][1] - pretrain.decay_tokens == pytest.approx(20e12, rel=1e-5)


def test_data_is_held_out_packed_and_cut_into_sequences_as_by_the_recipe(config: Config):
    """A shard of 29 x 128 is held out of the text, 1 % of the conversations; a sequence is a turn."""
    held_out = [config.pretrain_data.valid_fraction, config.pretrain_data.test_fraction]
    assert held_out == 2 * [pytest.approx(1 / (29 * 128), rel=0.2)]
    assert (config.sft_data.valid_fraction, config.sft_data.test_fraction) == (0.01, 0.01)
    assert (config.sft_data.pack_size, config.sft_data.algorithm) == (4096, "first_fit_shuffle")
    assert {source.sequences for source in config.chats} == {"turn"}


def test_every_optimizer_decays_weights_as_the_recipe_does(config: Config):
    optimizers = [config.pretrain.optimizer, config.sft.optimizer, config.lora.optimizer]
    values = {(o.adam_beta1, o.adam_beta2, o.adam_eps, o.weight_decay, o.clip_grad) for o in optimizers}
    assert values == {(0.9, 0.95, 1e-8, 0.1, 1.0)}
    assert config.lora.optimizer.learning_rate == 1e-4
    assert {training.run.log_interval for training in config.trainings() if training.packed} == {10}
