"""The original pieces of megatron-core in their places again."""

from __future__ import annotations

from collections.abc import Callable

import snaketron.model  # noqa: F401  before megatron
from snaketron.model.megatron import originals
from snaketron.model.megatron.originals import original
from tests.unit.model.megatron.rows import ROWS

import pytest


@pytest.fixture
def unreplaced(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """unreplaced(row) puts the original pieces back for a test."""

    def put_back(what: str) -> None:
        for name in ROWS[what].pieces:
            monkeypatch.setattr(*originals.owner_of(name), original(name))

    return put_back
