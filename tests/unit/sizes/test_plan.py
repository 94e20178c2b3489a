"""Estimates of a training, worked out by hand."""

from __future__ import annotations

from pathlib import Path

from snaketron.config import load
from snaketron.graph.configfiles import configuration
from snaketron.graph.dry_run import size_lines
from snaketron.sizes.memory import static_memory
from snaketron.sizes.plan import checkpoint_bytes, estimate
from snaketron.sizes.recording import work
from tests.conftest import REPOSITORY
from tests.unit.sizes.models import COUNTED

import pytest


def test_hours_and_jobs_follow_from_the_stated_throughput():
    """2,000 steps of 4 packs of 900 tokens are 7.2 million: 5 hours at 100 a second on each of 4 processes.

    Jobs of 2 hours that hand over 20 minutes before their end do 1 h 40 of it.
    """
    sft = {"train_iters": 2_000, "global_batch_size": 4, "tokens_per_second_per_gpu": 100}
    config = load({"sft_data": {"pack_size": 900}, "sft": sft | {"parallel": {"data_parallel_size": 4}}}, {})
    found = estimate(config, config.training("sft"))
    assert (found.tokens, found.hours, found.process_hours) == (
        7_200_000,
        pytest.approx(5),
        pytest.approx(20),
    )
    assert [found.num_jobs(limit, 1200) for limit in (6, 2, 0.2)] == [1, 3, None]


def test_without_a_throughput_no_time_is_estimated():
    config = load({}, {})
    found = estimate(config, config.training("sft"))
    assert (found.hours, found.process_hours, found.num_jobs(1, 0)) == (None, None, None)


def test_only_adapters_are_counted_as_trained():
    config = load(COUNTED | {"lora": {"rank": 8, "expert_rank": None}}, {})
    full, lora = (estimate(config, config.training(name)) for name in ("sft", "lora"))
    assert full.num_adapter_parameters is None and lora.num_adapter_parameters == 158_400
    assert full.num_parameters == lora.num_parameters
    assert full.memory.static == 16 * full.num_parameters  # fp32: weights, gradients and two moments
    trained = lora.num_adapter_parameters
    assert lora.memory.static == 4 * full.num_parameters + 16 * trained


def test_what_lies_on_a_gpu_is_that_of_the_fullest_one(monkeypatch: pytest.MonkeyPatch):
    """Of Super's four stages the first keeps most activations, and the last has most weights.

    A dry-run said 51.5 GB of the last beside the sum of the first, 57.5 GB; the plan had 50.7 for the first.
    """
    monkeypatch.chdir(REPOSITORY)
    config = configuration([Path("config/super.yaml"), Path("config/h100.yaml")])
    broad = config.training("pretrain/broad")
    stages = static_memory(work(config, broad))
    found = estimate(config, broad)
    assert found.memory.static == stages[0].total < max(stage.total for stage in stages)
    assert found.memory.static == found.memory.total - found.memory.activations
    assert "50.7 GB of weights, gradients and optimizer on the fullest, 57.5 GB" in "".join(
        size_lines(config, broad, found)
    )


def test_a_checkpoint_holds_weights_main_weights_and_moments():
    """4 + 4 + 8 bytes under fp32, 2 + 4 + 8 under bf16; on disk the default model took 30.4 MB, 4 % more."""
    config = load(COUNTED | {"lora": {"rank": 8, "expert_rank": None}}, {})
    broad = config.training("pretrain/broad")
    assert checkpoint_bytes(config, broad) == 16 * estimate(config, broad).num_parameters == 29_198_464
    assert checkpoint_bytes(config, config.training("lora")) == 16 * 158_400
    in_bf16 = {"gradient_precision": "bf16", "moment_precision": "bf16"}  # on the GPU, not in the file
    short = {"model": COUNTED["model"] | {"precision": "bf16"}, "sft": {"optimizer": in_bf16}}
    config = load(short, {})
    assert checkpoint_bytes(config, config.training("sft")) == 14 * 29_198_464 / 16
