"""Curves of the trainings: losses, learning rate, gradient norm, routers, speed, memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from snaketron.report.blocks import UNKNOWN, Block, Figure, Figures, Listing, Part, Text, number
from snaketron.report.charts import MAX_POINTS, Curve, draw
from snaketron.report.history import BLOCK, STRETCH
from snaketron.report.measured import across
from snaketron.report.runs import Run, Stage
from snaketron.wording import plural

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
MOST_SOURCES = 6  # curves of a drawing: so many dashes there are, and the table has all sources
FEW = ("valid_loss", "valid_sources")
MOST_DOTS = 40  # more of them hide their curve


def curves_part(runs: Sequence[Run]) -> Part:
    """A part for each training that any of the runs has begun."""
    names = dict.fromkeys(stage.name for run in runs for stage in run.stages)
    return Part("Curves", parts=[_of_training(name, runs) for name in names])


def _of_training(name: str, runs: Sequence[Run]) -> Part:
    found = {run.name: stage for run in runs if (stage := run.stage(name))}
    figures = [figure for title in CHARTS if (figure := _chart(name, title, found, len(runs) > 1))]
    blocks: list[Block] = [Figures(figures)] if figures else [Text("It has no metrics yet.", attention=True)]
    blocks += _thinned(found.values())
    blocks += _by_source(name, runs)
    for run, stage in found.items():
        if warnings := stage.history.warnings:
            of_run = f" of {run}" if len(runs) > 1 else ""
            blocks.append(Listing(f"{plural(len(warnings), 'warning')}{of_run} while training", warnings))
    return Part(f"Curves of {name}", blocks)


def _thinned(stages: Iterable[Stage]) -> list[Block]:
    """What is left out of the drawings of a long training; nothing for others."""
    most = max(stage.history.lines for stage in stages)
    if most <= MAX_POINTS:
        return []
    said = (
        f"There are {most:,} lines of metrics. A curve has up to {MAX_POINTS} points: the lowest and the "
        "highest value of each stretch of steps."
    )
    if most > BLOCK:
        said += f" Sums are of all lines, and medians of every {STRETCH}th."
    return [Text(said)]


def _by_source(name: str, runs: Sequence[Run]) -> list[Block]:
    """The losses of each corpus or source before, after and on the test split, where there are several.

    The weights of a blend are shares of samples or of packs. Packs have more or fewer trained tokens.
    """
    sample = "samples" if name.startswith("pretrain") else "packs"

    def rows(run: Run) -> list[list[str]]:
        stage = run.stage(name)
        told = ("sources", "valid_sources", "test_sources")  # the last two also of those that are held out
        names = list(dict.fromkeys(one for key in told for one in _sources(stage, key))) if stage else []
        if stage is None or len(names) < 2:
            return []
        shares = [_shares(stage, names, of) for of in (sample, "trained_tokens")]
        return [[one, *_losses(stage, one), *shares[0][one], *shares[1][one]] for one in names]

    header = [_word(name), "validation loss before", "after", "test loss", sample, "share"]
    header += ["trained tokens", "share"]
    return across(f"Loss by {_word(name)}", header, runs, rows)


def _shares(stage: Stage, names: Sequence[str], of: str) -> dict[str, tuple[str, str]]:
    """How much of what was trained each source had, and its share; unknown where no line tells it.

    So it is of sources that are held out as a whole.
    """
    counts = {one: int(stage.total("sources", one, of)) for one in _sources(stage, "sources")}
    if not (total := sum(counts.values())):
        counts = {}
    shares = {one: (f"{n:,}", f"{n / total:.1%}") for one, n in counts.items()}
    return {one: shares.get(one, (UNKNOWN, UNKNOWN)) for one in names}


def _losses(stage: Stage, source: str) -> list[str]:
    """The losses of the first and the last validation, and of the test."""
    valid = [loss for _, loss in stage.values("valid_sources", source)]
    found = valid[0] if valid else None, valid[-1] if len(valid) > 1 else None
    return [number(loss) for loss in (*found, stage.last("test_sources", source))]


def _sources(stage: Stage, of: str) -> list[str]:
    """The corpora or sources that metrics tell apart, in the order in which they came."""
    group = stage.history.metrics.parts.get(of)
    return list({**group.parts, **group.series}) if group else []


def _word(name: str) -> str:
    """What the parts of the data of a training are called."""
    return "corpus" if name.startswith("pretrain") else "source"


def _chart(name: str, title: str, found: dict[str, Stage], several: bool) -> Figure | None:
    curves = []
    for run_place, (run, stage) in enumerate(found.items()):
        for place, (path, label) in enumerate(_metrics(title, stage).items()):
            points = stage.values(*path)
            called = ": ".join(word for word in (run if several else "", label) if word)
            colour = run_place if several else place
            dots = len(points) < 4 or (path[0] in FEW and len(points) <= MOST_DOTS)
            curves.append(Curve(called, points, colour, place, dots=dots))
    sources = {one for stage in found.values() for one in _sources(stage, "sources")}
    many = "source" in title and len(sources) > MOST_SOURCES
    title = title.replace("source", _word(name)) + (f": {MOST_SOURCES} of {len(sources)}" if many else "")
    figure = draw(title, curves)
    return figure and Figure(title, f"{name}, {figure.alt}", figure.svg)


def _metrics(title: str, stage: Stage) -> dict[tuple[str, ...], str]:
    """The metrics of a drawing, those included whose names depend on the model and the data."""
    if "multi-token" in title:
        keys = stage.history.metrics.series
        depths = [found for key in keys if (found := re.fullmatch(r"mtp_(\d+)_loss", key))]
        return {(found[0],): f"token {int(found[1]) + 1} ahead" for found in depths}
    if title == "Loss by source, validation":
        names = _largest(stage, _sources(stage, "valid_sources"))
        return {("valid_sources", name): name for name in names}
    if title == "Loss by source, training":
        return {("sources", name, "loss"): name for name in _largest(stage, _sources(stage, "sources"))}
    return {tuple(key.split(".")): label for key, label in CHARTS[title].items()}


def _largest(stage: Stage, names: list[str]) -> list[str]:
    """The sources with the most trained tokens, in the order of `names`."""
    order = sorted(names, key=lambda name: -stage.total("sources", name, "trained_tokens"))
    return [name for name in names if name in order[:MOST_SOURCES]]
