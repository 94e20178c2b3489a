"""What a page is made of: parts with a title, and in them texts, facts, tables and figures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

UNKNOWN = "-"
OWN = "\ue000"  # stands in names within a drawing for what makes them different from those of others


@dataclass(frozen=True)
class Text:
    """A paragraph; `kind` may ask for attention."""

    text: str
    attention: bool = False
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Facts:
    """Names with a short value each."""

    facts: list[tuple[str, str]]
    kind: ClassVar[str] = "facts"


@dataclass(frozen=True)
class Table:
    """A table whose first `names` columns hold words, to the left, and the others numbers, to the right."""

    caption: str
    header: list[str]
    rows: list[list[str]]
    names: int = 1
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Figure:
    """A drawing as SVG that stands in the page, with its content in words."""

    title: str
    alt: str
    svg: str
    kind: ClassVar[str] = "figure"


@dataclass(frozen=True)
class Figures:
    """Drawings beside each other, as many as there is room for."""

    figures: list[Figure]
    kind: ClassVar[str] = "figures"


@dataclass(frozen=True)
class Listing:
    """Lines of plain text that are opened on demand."""

    summary: str
    lines: list[str]
    kind: ClassVar[str] = "listing"


@dataclass(frozen=True)
class Quotes:
    """Texts of a model or of its user beside each other, each with what it is."""

    title: str
    texts: list[tuple[str, str]]
    kind: ClassVar[str] = "quotes"


@dataclass(frozen=True)
class Tree:
    """A line, with what is less important of it in another colour, and below it those of its branches."""

    line: str
    branches: list[Tree] = field(default_factory=list)
    about: str = ""
    kind: ClassVar[str] = "tree"


@dataclass(frozen=True)
class Folded:
    """Blocks that are opened on demand."""

    summary: str
    blocks: Sequence[Block]
    kind: ClassVar[str] = "folded"


type Block = Text | Facts | Table | Figure | Figures | Listing | Quotes | Tree | Folded


@dataclass(frozen=True)
class Part:
    """A part of a page; its own parts are one heading lower."""

    title: str
    blocks: Sequence[Block] = ()
    parts: Sequence[Part] = ()

    @property
    def anchor(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")

    @property
    def is_empty(self) -> bool:
        return not self.blocks and all(part.is_empty for part in self.parts)


def number(value: float | None, digits: int = 4) -> str:
    return UNKNOWN if value is None else f"{value:,.{digits}f}"
