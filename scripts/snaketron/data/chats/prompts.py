"""The text before an answer compared with a prompt: what both share, tags of thinking, control tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable

# What only opens or closes thinking, with a tag for it. A prompt may end with it where the text of an answer
# without thinking has nothing of the kind.
_TAG = r"(?:<[^<>]*(?:think|thought|channel|reason)[^<>]*>|\[/?THINK\])"
_THINKING = re.compile(rf"\s*(?:{_TAG}(?:\s|thought\b)*)+", re.IGNORECASE)
_UNIT = re.compile(r"<[^<>\s]*>|\[[^\[\]\s]*\]|\w+|\s+|.", re.DOTALL)  # a tag, a word, white space, a sign


def is_tag(text: str) -> bool:
    """Whether a text begins with what looks like a control token, which no answer holds."""
    return _UNIT.match(text) is not None and text.startswith("<") and not opens(text)


def opens(text: str) -> bool:
    """Whether a text only opens or closes thinking."""
    return _THINKING.fullmatch(text) is not None


def without(text: str, endings: Iterable[str]) -> set[str]:
    """The text without each of the endings that it has."""
    return {text.removesuffix(ending) for ending in endings if text.endswith(ending)}


def common(text: str, other: str) -> int:
    """How many characters two texts share at their beginnings."""
    different = (i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b)
    return next(different, min(len(text), len(other)))


def shared(text: str, other: str) -> int:
    """How many characters two texts share at their beginnings, without a part of a tag or a word."""
    length = 0
    same = common(text, other)
    for unit in _UNIT.finditer(other):
        if unit.end() > same:
            break
        length = unit.end()
    return length
