"""Curves as small drawings for a page: legible at 320 pixels, in its colours, with their content in words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from snaketron.report.blocks import OWN, Figure
from snaketron.report.figures import (
    BLUE,
    DARK,
    GREEN,
    GREY,
    LIGHT,
    PURPLE,
    SKY,
    STYLE,
    VERMILION,
    as_svg,
    drawing,
)
from snaketron.wording import short

from matplotlib.ticker import FuncFormatter, MaxNLocator

MAX_NAME = 24  # characters of a curve that has another one beside it in the legend
MAX_POINTS = 300  # of a curve: as many as its drawing has pixels
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, SKY, DARK)
DASHES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1)), (0, (1, 1)))
# What the drawings are written in, and what the page calls it (page.css).
_OF_PAGE = {DARK: "var(--ink)", GREY: "var(--muted)", LIGHT: "var(--line)"}
_COLOURS = re.compile("|".join(_OF_PAGE), re.IGNORECASE)
_STYLE = STYLE | {
    "font.size": 11,
    "axes.axisbelow": "line",
    "axes.grid": True,
    "axes.grid.axis": "both",
    "legend.fontsize": 10,
}


@dataclass(frozen=True)
class Curve:
    """Points of a curve by their x; its colour and its dash by their numbers in `COLOURS` and `DASHES`."""

    name: str
    points: list[tuple[float, float]]
    colour: int = 0
    dash: int = 0
    dots: bool = False  # few points, each of which counts


def draw(title: str, curves: Sequence[Curve]) -> Figure | None:
    """Curves over the steps; None where there are no points."""
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return None
    columns = 2 if max(len(curve.name) for curve in curves) <= MAX_NAME else 1
    height = 2.5 + 0.18 * (len(curves) > 1) * -(-len(curves) // columns)
    with drawing(height, 4.8, _STYLE) as figure:
        axes = figure.subplots()
        for curve in curves:
            xs, ys = zip(*thinned(curve.points), strict=True)
            few = curve.dots or len(xs) == 1
            axes.plot(
                *(xs, ys),
                color=COLOURS[curve.colour % len(COLOURS)],
                linestyle=DASHES[curve.dash % len(DASHES)],
                linewidth=1.6,
                marker="o" if few else None,
                markersize=4,
                label=curve.name,
            )
        _axes(axes)
        if len(curves) > 1:
            figure.legend(loc="outside upper left", ncols=columns, handlelength=2.2, columnspacing=1.2)
        svg = as_svg(figure).decode()
    words = ". ".join(_in_words(curve) for curve in curves)
    alt = f"{title}: {words}."
    return Figure(title, alt, inline(svg, alt))


def _axes(axes: Any) -> None:
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(short))
    if not axes.dataLim.intervaly.any():  # counts that are all 0, which have no scale of their own
        axes.set_ylim(-0.05, 1)  # not on the axis, where nobody would see them
    low, high = axes.get_ylim()
    if high - low > 1e-9 * max(abs(high), 1e-9) and (high >= 1000 or high < 0.01):
        axes.yaxis.set_major_formatter(FuncFormatter(short))
    axes.tick_params(length=0)
    axes.margins(x=0.02)


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MAX_POINTS` of the points: the lowest and the highest of each stretch, so that spikes stay."""
    if len(points) <= MAX_POINTS:
        return list(points)
    size = -(-2 * len(points) // MAX_POINTS)
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


def _in_words(curve: Curve) -> str:
    (first_x, first), (last_x, last) = curve.points[0], curve.points[-1]
    name = f"{curve.name} " if curve.name else ""
    if len(curve.points) == 1:
        return f"{name}{first:.4g} at step {first_x:,.0f}"
    least, most = (pick(curve.points, key=lambda p: p[1]) for pick in (min, max))
    return (
        f"{name}from {first:.4g} at step {first_x:,.0f} to {last:.4g} at step {last_x:,.0f}, "
        f"lowest {least[1]:.4g} at {least[0]:,.0f}, highest {most[1]:.4g} at {most[0]:,.0f}"
    )


def inline(svg: str, alt: str) -> str:
    """A drawing of matplotlib as a part of a page: in its colours and width, with names of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda m: f' id="{OWN}{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{OWN}", svg)
    svg = re.sub(r'(<path [^>]*style="fill: )#ffffff', r"\1none", svg)  # the paper is that of the page
    svg = _COLOURS.sub(lambda m: _OF_PAGE[m[0].lower()], svg)
    svg = svg.replace("'DejaVu Sans'", "system-ui, sans-serif")
    (view,) = re.findall(r'viewBox="[^"]+"', svg[: svg.index(">")])
    body = re.sub(r"\n\s*", "\n", svg[svg.index(">") + 1 :])
    return f'<svg {view} role="img" aria-label="{escape(alt)}">{body.strip()}'
