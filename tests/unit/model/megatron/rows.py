"""The rows of the table of replacements, and which of them the tests are about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import snaketron.model  # noqa: F401  before megatron
from snaketron.model import backend
from snaketron.model.megatron.originals import original
from snaketron.model.megatron.replacements import TABLE

import pytest

ROWS = {row.what: row for row in TABLE}

TESTED: set[str] = set()

CAN_GO = "the installed megatron-core does this itself: this row of `replacements.TABLE` can go"


def covers(what: str) -> Callable[[Any], Any]:
    """Say which row a test is about; on a machine with a GPU leave out those for CPUs."""
    TESTED.add(what)
    for_cpu = ROWS[what].machine == "CPU"
    return pytest.mark.skipif(backend.HAS_GPU and for_cpu, reason="a row for machines without a GPU")


def originals_of(what: str) -> dict[str, Any]:
    """The original pieces of a row, by the last part of their names."""
    return {name.rpartition(".")[2].rpartition(":")[2]: original(name) for name in ROWS[what].pieces}
