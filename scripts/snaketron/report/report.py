"""The page about one run or several beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from snaketron.report import figures
from snaketron.report.answers import answers_part
from snaketron.report.blocks import UNKNOWN, Block, Part, Table, Text
from snaketron.report.curves import curves_part
from snaketron.report.data_report import data_parts
from snaketron.report.evaluations import evaluations_part
from snaketron.report.measured import measured_part
from snaketron.report.origin import lineage_part
from snaketron.report.overview import summary_part
from snaketron.report.page import html
from snaketron.report.progress import progress_part
from snaketron.report.runs import Run
from snaketron.report.sections import sections
from snaketron.report.setup import configuration_part, environment_part


def report(runs: Sequence[Run]) -> str:
    """A page of HTML about the runs that needs no other file."""
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    names = [run.name for run in runs]
    title = f"Report on {names[0]}" if len(runs) == 1 else f"{len(runs)} runs: {', '.join(names)}"
    parts = [
        summary_part(runs),
        _for_each("Graph", runs, [progress_part(run) for run in runs]),
        _for_each("Data", runs, [_data_part(run) for run in runs], _tokens(runs)),
        curves_part(runs),
        measured_part(runs),
        evaluations_part(runs),
        answers_part(runs),
        _for_each("Lineage", runs, [lineage_part(run) for run in runs]),
        configuration_part(runs),
        environment_part(runs, date),
    ]
    return html(
        title, parts, f"Made on {date}, from what lies in {', '.join(str(r.directory) for r in runs)}."
    )


def _for_each(title: str, runs: Sequence[Run], parts: Sequence[Part], first: Sequence[Block] = ()) -> Part:
    """A part of one run, or those of several below each other under their names, after what is of all."""
    if len(runs) == 1:
        return Part(title, parts[0].blocks, parts[0].parts)
    named = zip(runs, parts, strict=True)
    return Part(title, first, [Part(f"{title} of {run.name}", p.blocks, p.parts) for run, p in named])


def _tokens(runs: Sequence[Run]) -> list[Block]:
    """The training tokens of the corpora and sources of several runs, beside each other."""
    found = [
        {name: text.tokens["train"] for name, text in run.data.texts.items()}
        | {name: chats.tokens for name, chats in run.data.chats.items()}
        for run in runs
    ]
    names = sorted({name for one in found for name in one})
    rows = [[name, *(f"{one[name]:,}" if name in one else UNKNOWN for one in found)] for name in names]
    return [Table("Tokens of each source", ["source", *(run.name for run in runs)], rows)] if rows else []


def _data_part(run: Run) -> Part:
    drawn = {name: draw(run.data) for name, draw in figures.FIGURES.items()}
    shown = [section for section in sections(run.data) if section.title != "Time"]  # the graph has times
    found = data_parts(shown, drawn)
    return Part("Data", parts=found) if found else Part("Data", [Text("No data has a record yet.")])
