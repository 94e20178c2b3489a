"""Lineage records for stories that need one and no job that would write it."""

from __future__ import annotations

from typing import Any


def record(kind: str, name: str = "", **parts: Any) -> dict[str, Any]:
    """The content of a record: `parts`, and nothing in the place of the others."""
    nothing: dict[str, Any] = {"inputs": [], "outputs": [], "settings": {}, "versions": {}, "counts": {}}
    made = {"kind": kind, "name": name, "created": "2026-11-02T10:30:00+00:00", "seconds": 1.0}
    return made | nothing | parts
