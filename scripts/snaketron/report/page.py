"""Pages of HTML that need no other file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from snaketron.report.blocks import OWN, Part
from snaketron.report.progress import SIGNS

import jinja2

_HERE = Path(__file__).parent


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string((_HERE / "page.html.jinja").read_text(encoding="utf-8"))


def html(title: str, parts: Sequence[Part], about: str = "") -> str:
    """A page of the parts that have content."""
    marks = {f"{sign} ": name for name, sign in SIGNS.items()}
    shown = [part for part in parts if not part.is_empty]
    style = (_HERE / "page.css").read_text(encoding="utf-8")
    page = _template().render(title=title, about=about, parts=shown, style=style, marks=marks)
    drawings = enumerate(page.split("<svg "))
    return "<svg ".join(part.replace(OWN, f"f{number}-") for number, part in drawings)
