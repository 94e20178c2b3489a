"""A row of the table of replacements: what it replaces and why, and what it puts there."""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass, field
from typing import Any, Literal

NONE_FOUND = "none found"  # an `upstream`
Machine = Literal["all", "CPU", "GPU"]


@dataclass(frozen=True)
class Replacement:
    """A row of the table.

    `pieces` maps names, such as "megatron.core.utils:Class.method", to what takes their place: a name in this
    folder ("padding.apply_expert_bias"), or a `Value`. `modules` does so for whole modules, before
    megatron-core is imported; None makes importing one an ImportError. `in_objects` are replaced in the
    objects of one training, where its settings ask for it, and not by `apply`.
    """

    what: str
    machine: Machine
    why: str
    upstream: str  # the issue or pull request
    until: str  # when it goes
    pieces: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, Any] = field(default_factory=dict)
    in_objects: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Value:
    """An object that takes a place itself, where a text would name what does."""

    value: Any


def stand_in(by: str | Value) -> Any:
    """What a row puts in a place."""
    if isinstance(by, Value):
        return by.value
    module, _, attribute = by.partition(".")
    return pkgutil.resolve_name(f"snaketron.model.megatron.{module}:{attribute}")
