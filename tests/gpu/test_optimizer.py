"""The optimizer's step on a GPU against megatron-core's."""

from __future__ import annotations

import snaketron.model  # noqa: F401  before megatron
from tests.gpu.test_training import DETERMINISTIC
from tests.unit.model.megatron.test_adam import compare

import pytest

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_step_is_that_of_megatron_core(monkeypatch, precision):
    for name, value in DETERMINISTIC.items():
        monkeypatch.setenv(name, value)
    compare(monkeypatch, precision)
