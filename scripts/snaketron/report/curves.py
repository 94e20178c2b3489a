"""Curves of the trainings: losses, learning rate, gradient norm, routers, speed, memory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from snaketron.report.blocks import Block, Figure, Figures, Listing, Part, Text, number
from snaketron.report.charts import Curve, draw
from snaketron.report.measured import across
from snaketron.report.runs import Run, Stage

# The drawings of a training in their order: its title, and its metrics with what they are called.
CHARTS: dict[str, dict[str, str]] = {
    "Loss (nats a token)": {"loss": "training", "valid_loss": "validation"},
    "Loss of multi-token prediction": {},  # as many as the model has
    "Loss by source, training": {},
    "Loss by source, validation": {},
    "Learning rate": {"learning_rate": ""},
    "Gradient norm before clipping": {"grad_norm": ""},
    "Load-balancing loss of the routers (1: even)": {"load_balancing_loss": ""},
    "Load of experts (1: mean of a layer)": {
        "experts.most": "most used",
        "experts.least": "least used",
    },
    "Experts that hardly get a token": {"experts.dead": ""},
    "Tokens a second and process": {"timing.tokens_per_second_per_process": ""},
    "Peak memory of a process (GiB)": {"timing.peak_memory_gib": ""},
}
FEW = ("valid_loss", "valid_sources")


def curves_part(runs: Sequence[Run]) -> Part:
    """A part for each training that any of the runs has begun."""
    names = dict.fromkeys(stage.name for run in runs for stage in run.stages)
    return Part("Curves", parts=[_of_training(name, runs) for name in names])


def _of_training(name: str, runs: Sequence[Run]) -> Part:
    found = {run.name: stage for run in runs if (stage := run.stage(name))}
    figures = [figure for title in CHARTS if (figure := _chart(name, title, found, len(runs) > 1))]
    blocks: list[Block] = [Figures(figures)] if figures else [Text("It has no metrics yet.", attention=True)]
    blocks += _by_source(name, runs)
    for run, stage in found.items():
        if warnings := warnings_of(stage):
            of_run = f" of {run}" if len(runs) > 1 else ""
            blocks.append(Listing(f"{len(warnings)} warnings{of_run} while training", warnings))
    return Part(f"Curves of {name}", blocks)


def warnings_of(stage: Stage) -> list[str]:
    """What the training warned of, a line each."""
    return [
        f"step {line['iteration']}: {said['text']}"
        for line in stage.lines
        for part in (line, line.get("timing", {}))
        for said in part.get("warnings", ())
    ]


def _by_source(name: str, runs: Sequence[Run]) -> list[Block]:
    """The losses of each corpus or source before, after and on the test split, where there are several."""

    def rows(run: Run) -> list[list[str]]:
        stage, tokens = run.stage(name), Counter[str]()
        for line in stage.lines if stage else ():
            tokens.update({one: said["trained_tokens"] for one, said in line.get("sources", {}).items()})
        if stage is None or len(tokens) < 2:
            return []
        return [
            [one, *_losses(stage, one), f"{n:,}", f"{n / tokens.total():.1%}"] for one, n in tokens.items()
        ]

    header = [_word(name), "validation loss before", "after", "test loss", "trained tokens", "share"]
    return across(f"Loss by {_word(name)}", header, runs, rows)


def _losses(stage: Stage, source: str) -> list[str]:
    """The losses of the first and the last validation, and of the test."""

    def losses(key: str) -> list[float]:
        return [line[key][source] for line in stage.lines if source in line.get(key, {})]

    valid, test = losses("valid_sources"), losses("test_sources")
    found = valid[0] if valid else None, valid[-1] if len(valid) > 1 else None, test[-1] if test else None
    return [number(loss) for loss in found]


def _word(name: str) -> str:
    """What the parts of the data of a training are called."""
    return "corpus" if name.startswith("pretrain") else "source"


def _chart(name: str, title: str, found: dict[str, Stage], several: bool) -> Figure | None:
    curves = []
    for run_place, (run, stage) in enumerate(found.items()):
        for place, (key, label) in enumerate(_metrics(title, stage).items()):
            points = _points(stage, key)
            called = ": ".join(word for word in (run if several else "", label) if word)
            colour = run_place if several else place
            curves.append(Curve(called, points, colour, place, dots=key.startswith(FEW) or len(points) < 4))
    title = title.replace("source", _word(name))
    figure = draw(title, curves)
    return figure and Figure(title, f"{name}, {figure.alt}", figure.svg)


def _points(stage: Stage, key: str) -> list[tuple[float, float]]:
    if not key.startswith(("sources/", "valid_sources/")):
        return stage.values(key)
    outer, _, source = key.partition("/")
    points = []
    for line in stage.lines:
        value = line.get(outer, {}).get(source)
        value = value.get("loss") if isinstance(value, dict) else value
        if value is not None:
            points.append((float(line["iteration"]), float(value)))
    return points


def _metrics(title: str, stage: Stage) -> dict[str, str]:
    """The metrics of a drawing, those included whose names depend on the model and the data."""
    keys = dict.fromkeys(key for line in stage.lines for key in line)
    if "multi-token" in title:
        depths = [found for key in keys if (found := re.fullmatch(r"mtp_(\d+)_loss", key))]
        return {found[0]: f"token {int(found[1]) + 1} ahead" for found in depths}
    if "by source" in title:
        outer = "valid_sources" if "validation" in title else "sources"
        names = dict.fromkeys(name for line in stage.lines for name in line.get(outer, {}))
        return {f"{outer}/{name}": name for name in names}
    return CHARTS[title]
