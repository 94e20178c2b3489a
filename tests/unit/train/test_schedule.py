"""The learning rate of each step, against values by hand."""

from __future__ import annotations

import math

from snaketron.config import load
from snaketron.settings.schedule import learning_rate
from snaketron.settings.training import TrainSettings, train_settings
from snaketron.train.schedule import build_schedule, seek

import pytest
import torch

RATES = {"learning_rate": 1.0, "min_learning_rate": 0.1}
MIX = [{"corpus": "docs", "weight": 1}]


def phases(decay_tokens: int) -> dict[str, TrainSettings]:
    """`a` of 10 steps of 100 tokens, then `b` of 24 steps of 50 tokens; warm-up over 400 tokens."""
    pretrain = {
        "seq_length": 10,
        "global_batch_size": 10,
        "micro_batch_size": 5,
        "warmup_tokens": 400,
        "decay_tokens": decay_tokens,
        "optimizer": RATES,
        "phases": [
            {"name": "a", "tokens": 1000, "blend": MIX},
            {"name": "b", "tokens": 1200, "blend": MIX, "seq_length": 5},
        ],
    }
    config = load({"pretrain": pretrain}, {})
    return {name: train_settings(config, f"pretrain/{name}") for name in ("a", "b")}


def rates(settings: TrainSettings, *iterations: int) -> list[float]:
    """The learning rate of the step after each of `iterations` steps; in the order that they are given."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
    scheduler = build_schedule(optimizer, settings.optimizer, settings.schedule)
    found = []
    for iteration in iterations:
        seek(scheduler, settings.schedule, iteration)
        found.append(optimizer.param_groups[0]["lr"])
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    # What plans and comparisons compute without megatron-core.
    assert found == pytest.approx(
        [learning_rate(settings.schedule, settings.optimizer, i) for i in iterations]
    )
    return found


def test_wsd_over_two_phases():
    """The decay is from token 600 to 2,200; the rate is 0.1 + 0.9 (1 - sqrt(share of it))."""
    found = phases(decay_tokens=1600)
    # Tokens 0, 200, 400, 500, 600 and 1,000; the last is a quarter of the way.
    assert rates(found["a"], 0, 2, 4, 5, 6, 10) == pytest.approx([0, 0.5, 1, 1, 1, 0.1 + 0.9 * 0.5])
    # Tokens 1,000, 1,500 (9/16 of the way) and 2,200.
    assert rates(found["b"], 0, 10, 24) == pytest.approx([0.55, 0.1 + 0.9 * 0.25, 0.1])


@pytest.mark.parametrize("decay_tokens", [0, 1200, 1600])
def test_a_phase_begins_where_the_one_before_it_ended(decay_tokens):
    found = phases(decay_tokens)
    assert rates(found["a"], 10) == rates(found["b"], 0)


def test_a_stable_phase_stays_at_the_maximum():
    assert rates(phases(decay_tokens=1200)["a"], 4, 7, 9) == [1, 1, 1]
    assert rates(phases(decay_tokens=0)["b"], 0, 12, 23) == [1, 1, 1]


def test_a_phase_with_a_rate_of_its_own_keeps_it_at_every_step():
    own = {"name": "long", "tokens": 1000, "blend": MIX, "seq_length": 50, "learning_rate": 0.01}
    first = {"name": "a", "tokens": 1000, "blend": MIX}
    keys = {"seq_length": 10, "global_batch_size": 10, "micro_batch_size": 5, "optimizer": RATES}
    config = load({"pretrain": keys | {"warmup_tokens": 400, "decay_tokens": 0, "phases": [first, own]}}, {})
    assert rates(train_settings(config, "pretrain/long"), 0, 1, 2) == [0.01, 0.01, 0.01]


def test_every_step_of_the_curriculum_by_the_formula():
    def expected(token: int) -> float:
        if token < 400:
            return token / 400
        return 1.0 if token <= 1000 else 0.1 + 0.9 * (1 - math.sqrt((token - 1000) / 1200))

    found = phases(decay_tokens=1200)
    assert rates(found["a"], *range(10)) == pytest.approx([expected(100 * i) for i in range(10)])
    assert rates(found["b"], *range(24)) == pytest.approx([expected(1000 + 50 * i) for i in range(24)])


def test_cosine_of_sft():
    """Two steps of warm-up, then a half wave over eight: 0.1 + 0.9 (1 + cos(pi share)) / 2."""
    config = load({"sft": {"train_iters": 10, "warmup_iters": 2, "optimizer": RATES}}, {})
    settings = train_settings(config, "sft")
    quarter = 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2
    assert rates(settings, 0, 1, 2, 4, 6, 10) == pytest.approx([0, 0.5, 1, quarter, 0.55, 0.1])


def test_the_rate_depends_on_the_step_alone():
    """A resumed run asks for a later step at once, one that goes back for an earlier one."""
    settings = phases(decay_tokens=1600)["b"]
    assert rates(settings, 20, 3, 20) == [*rates(settings, 20), *rates(settings, 3), *rates(settings, 20)]
