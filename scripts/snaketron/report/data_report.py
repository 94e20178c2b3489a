"""The report on the data of a run: the files that rule data_report makes, and its parts on other pages."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from snaketron.lineage.record import making
from snaketron.report.blocks import Block, Figure, Listing, Part, Table, Text
from snaketron.report.collect import Data, collect
from snaketron.report.page import html
from snaketron.report.sections import Section, sections
from snaketron.report.tables import table
from snaketron.wording import plural

FIGURE_TITLES = {
    "tokens": "Tokens of each corpus and split",
    "lengths": "Lengths of documents (blue) and conversations (orange)",
    "mix": "Share of each corpus in each phase",
    "removed": "What was removed, by step and reason",
    "packing": "How full the packs are, and how much of them is trained",
}


def write(paths: Sequence[Path], directory: Path) -> Data:
    """Write report.md, report.html, the figures and record.json, about the records at `paths`."""
    from snaketron.report import figures

    started = time.monotonic()
    data = collect(paths)
    parts = sections(data)
    drawn = {name: draw(data) for name, draw in figures.FIGURES.items()}
    contents = {f"{name}.svg": svg for name, svg in drawn.items()}
    contents["report.md"] = markdown(parts).encode()
    contents["report.html"] = html("Data report", data_parts(parts, drawn)).encode()
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


def data_parts(parts: Sequence[Section], figures: Mapping[str, bytes]) -> list[Part]:
    """The sections of the data report with their drawings, which are SVG by name."""
    from snaketron.report.charts import inline

    made = []
    for section in parts:
        blocks: list[Block] = [Text(section.text)]
        if section.figure:
            alt = f"{FIGURE_TITLES[section.figure]}. The table after it has the numbers."
            svg = inline(figures[section.figure].decode(), alt)
            blocks.append(Figure(FIGURE_TITLES[section.figure], alt, svg))
        blocks.append(Table(section.title, section.header, section.rows))
        if section.details:
            blocks.append(Listing(plural(len(section.details), "detail"), section.details))
        made.append(Part(section.title, blocks))
    return made
