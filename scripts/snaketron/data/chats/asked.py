"""Messages that note what a template asks them for: any other key of a message reaches nobody."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


class Asked(dict[str, Any]):
    """A message that adds each key that it is asked for to `asked`; whoever goes through it asks for all."""

    def __init__(self, message: Mapping[str, Any], asked: set[str]) -> None:
        super().__init__(message)
        self._asked = asked

    def __getitem__(self, key: str) -> Any:
        self._asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._asked.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self._asked.add(str(key))
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        self._all()
        return super().__iter__()

    def __reversed__(self) -> Iterator[str]:
        self._all()
        return super().__reversed__()

    def copy(self, /, **changed: Any) -> Asked:
        """A message with other values of some keys."""
        return Asked(dict(super().items()) | changed, self._asked)

    def keys(self) -> Any:
        self._all()
        return super().keys()

    def values(self) -> Any:
        self._all()
        return super().values()

    def items(self) -> Any:
        self._all()
        return super().items()

    def __repr__(self) -> str:
        self._all()
        return super().__repr__()

    def _all(self) -> None:
        self._asked.update(super().keys())


def dict_of(*given: Any, **values: Any) -> dict[str, Any]:
    """`dict` in templates: that of a message notes what it is asked for, too."""
    if len(given) == 1 and isinstance(given[0], Asked):
        return given[0].copy(**values)
    return dict(*given, **values)
