"""Markdown tables that also read well as plain text."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, names: int = 1) -> str:
    """A table whose first `names` columns stand to the left, and the numbers after them to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        fields = enumerate(zip(cells, widths, strict=True))
        return "| " + " | ".join(c.ljust(w) if i < names else c.rjust(w) for i, (c, w) in fields) + " |"

    rule = "|".join("-" * (w + 1) + ("-" if i < names else ":") for i, w in enumerate(widths))
    return "\n".join([line(header), f"|{rule}|", *map(line, rows)])
