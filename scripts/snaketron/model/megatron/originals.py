"""The one mechanism that puts something in the place of a piece of megatron-core or torch."""

from __future__ import annotations

import pkgutil
from typing import Any

MISSING = object()  # what a name stands for that is not there
_originals: dict[str, Any] = {}


def replace(name: str, value: Any) -> None:
    """Put `value` at `name`, such as "megatron.core.utils:Class.method", and keep what was there."""
    owner, attribute = owner_of(name)
    if name not in _originals:
        _originals[name] = getattr(owner, attribute, MISSING)
    setattr(owner, attribute, value)


def original(name: str) -> Any:
    """What was at `name` before `replace`; what is there if it was not replaced on this machine."""
    if name in _originals:
        return _originals[name]
    owner, attribute = owner_of(name)
    return getattr(owner, attribute)


def current(name: str) -> Any:
    """What is at `name` now."""
    owner, attribute = owner_of(name)
    return getattr(owner, attribute, MISSING)


def owner_of(name: str) -> tuple[Any, str]:
    """The module or class that has the piece, and the name that it has there."""
    module, _, path = name.partition(":")
    owner, _, attribute = path.rpartition(".")
    return pkgutil.resolve_name(f"{module}:{owner}" if owner else module), attribute
