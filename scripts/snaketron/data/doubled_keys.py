"""Objects of JSON in which a key stands twice.

The readers of JSON keep the last value of such a key, in silence. Python's reader can tell, at a fifth of the
speed of orjson; so a row is only read by it if counting shows that it may hold one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

# The end of a key; also an escaped quote within a text, or a text that begins with `:`.
_END = re.compile(rb'"[ \t\r]*:')


class DoubledKey(ValueError):
    """A key that stands twice in one object."""

    def __init__(self, key: str) -> None:
        super().__init__(f"the key {key!r} stands twice in one object")


def loads(text: str | bytes, *, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """The value of a JSON text, as json.loads gives it; `DoubledKey` where an object has a key twice."""
    return json.loads(text, parse_constant=parse_constant, object_pairs_hook=_object)


def may_be_doubled(line: bytes, value: Any) -> bool:
    """Whether `line`, a JSON text that was read as `value`, may have a key twice in one object.

    It may not where the text has no more ends of keys than the value has keys. A text that begins with a
    colon looks like an end, and its line is then read in vain.
    """
    num_keys = _num_keys(value)
    return len(_END.findall(line)) != num_keys and num_keys != sum(
        not _is_escaped(line, found.start()) for found in _END.finditer(line)
    )


def _is_escaped(line: bytes, quote: int) -> bool:
    """Whether a quote has a backslash before it that is not itself escaped."""
    first = quote
    while line[first - 1 : first] == b"\\":
        first -= 1
    return (quote - first) % 2 == 1


def _num_keys(value: Any) -> int:
    """The keys of all objects in a value."""
    inner: Iterable[Any]
    if type(value) is dict:
        count, inner = len(value), value.values()
    else:
        count, inner = 0, value
    for item in inner:
        if type(item) is dict or type(item) is list:
            count += _num_keys(item)
    return count


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise DoubledKey(max(keys, key=keys.count))
    return found
