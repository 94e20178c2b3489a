"""The data report as files: Markdown, one page of HTML, figures, and a record of them."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from pathlib import Path

from snaketron.lineage.record import making
from snaketron.report.collect import Data, collect
from snaketron.report.sections import Section, sections

import jinja2

_TEMPLATE = Path(__file__).with_name("page.html.jinja")


def write(paths: Sequence[Path], directory: Path) -> Data:
    """Write report.md, report.html, the figures and record.json, about the records at `paths`."""
    from snaketron.report import figures

    started = time.monotonic()
    data = collect(paths)
    parts = sections(data)
    drawn = {name: draw(data) for name, draw in figures.FIGURES.items()}
    contents = {f"{name}.svg": svg for name, svg in drawn.items()}
    contents["report.md"] = markdown(parts).encode()
    contents["report.html"] = html(parts, drawn).encode()
    outputs = {name: directory / name for name in contents}
    with making("report", "data", outputs=outputs, record=directory / "record.json", started=started) as job:
        for name, content in contents.items():
            job.aside[name].write_bytes(content)
        job.inputs = {"records": paths}
        job.counts = {"records": sum(map(len, data.seconds.values()))}
    return data


def markdown(parts: Sequence[Section]) -> str:
    """The report as text."""
    blocks = ["# Data report"]
    for part in parts:
        blocks += [f"## {part.title}", part.text, table(part.header, part.rows)]
        if part.details:
            blocks.append("\n".join(f"- {_plain(detail)}" for detail in part.details))
    return "\n\n".join(blocks) + "\n"


def _plain(text: str) -> str:
    """Quote text from the data as Markdown code, so that nothing in it is taken for markup."""
    return f"`{text.replace('`', chr(39))}`"


def html(parts: Sequence[Section], figures: dict[str, bytes]) -> str:
    """The report as one page that needs no other file; `figures` are SVG by name."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    images = {name: base64.b64encode(svg).decode() for name, svg in figures.items()}
    return environment.from_string(_TEMPLATE.read_text()).render(parts=parts, images=images)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table that also reads well as plain text: names to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        aligned = [
            c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(aligned) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])
