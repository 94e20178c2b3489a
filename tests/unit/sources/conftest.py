"""Servers of the tests are asked as they are, whatever proxy the machine has; a store in memory."""

from __future__ import annotations

import fsspec
import pytest


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def store() -> None:
    system = fsspec.filesystem("memory")
    system.store.clear()
    for path in ("raw/b.jsonl", "raw/deep/a.parquet", "raw/README.md", "raw/.c.jsonl", "raw/.tmp/d.jsonl"):
        system.pipe(f"/{path}", path.encode())
