"""The figures of the data report, as SVG: the same data gives the same bytes."""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from snaketron.config.data import SPLITS
from snaketron.report.collect import Data
from snaketron.wording import binary, large, short

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

# The palette of Okabe and Ito, which colour-blind people can tell apart; grey is for the rest.
BLUE, ORANGE, GREEN, SKY, VERMILION, PURPLE, YELLOW = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#56B4E9",
    "#D55E00",
    "#CC79A7",
    "#F0E442",
)
COLOURS = (BLUE, ORANGE, GREEN, SKY, VERMILION, PURPLE, YELLOW)
OTHERS = "#757575"  # white can be read on it
GREY, DARK, LIGHT = "#999999", "#333333", "#dddddd"
MAX_REASONS = 30  # bars of the figure of what was removed; the table has all
MAX_PANELS = 8  # of lengths; more sources have a strip each
MAX_NAME = 18  # characters beside a row; where one is longer, names stand above their rows
ROW_INCHES = 0.32
WIDTH = 5.0  # inches; a phone is about as wide

STYLE: dict[str, Any] = {
    "svg.hashsalt": "snaketron",
    "svg.fonttype": "none",  # letters that can be searched, in a tenth of the bytes
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 10,
    "text.color": DARK,
    "axes.labelcolor": DARK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid.axis": "x",
    "grid.color": LIGHT,
    "grid.linewidth": 0.6,
    "xtick.color": DARK,
    "ytick.color": DARK,
    "ytick.major.size": 0,
    "legend.frameon": False,
}


@contextmanager
def drawing(height: float, width: float = WIDTH, style: Mapping[str, Any] = STYLE) -> Iterator[Figure]:
    with mpl.rc_context(cast(Any, style)):
        yield Figure(figsize=(width, height), layout="constrained")


def as_svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _nothing(what: str) -> bytes:
    """A figure with only a sentence: the rule promises every figure, whatever the data."""
    with drawing(1.0) as figure:
        figure.text(0.5, 0.5, what, ha="center", va="center", color=GREY)
        return as_svg(figure)


def _names(axes: Any, names: Sequence[str], most: int = MAX_NAME) -> None:
    """Label the rows with names, the first at the top; above the rows where one has more characters."""
    if not _are_long(names, most):
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        return
    axes.set_yticks([])
    axes.set_ylim(len(names) - 0.4, -0.8)
    for row, name in enumerate(names):
        axes.text(0.01, row - 0.5, name, transform=axes.get_yaxis_transform(), fontsize=9, va="center")


def _are_long(names: Sequence[str], most: int = MAX_NAME) -> bool:
    return max(map(len, names)) > most


def _rows_inches(names: Sequence[str]) -> float:
    """The height of rows of which each is a line, and one more where their names stand above."""
    return ROW_INCHES * len(names) * (1.6 if _are_long(names) else 1)


# ------------------------------------------------------------------------------------------- figures


def draw_tokens(data: Data) -> bytes:
    """Tokens of each corpus and split."""
    if not data.texts:
        return _nothing("no corpora")
    names = sorted(data.texts, key=lambda name: (-data.texts[name].tokens["train"], name))
    with drawing(1.1 + _rows_inches(names)) as figure:
        axes = figure.subplots()
        for row, name in enumerate(names):
            values = [data.texts[name].tokens[split] for split in SPLITS if data.texts[name].tokens[split]]
            if values:
                axes.plot([min(values), max(values)], [row, row], color=LIGHT, linewidth=2, zorder=1)
        for split, colour, marker in zip(SPLITS, (BLUE, ORANGE, GREEN), "oDs", strict=True):
            points = [(data.texts[n].tokens[split], row) for row, n in enumerate(names)]
            points = [point for point in points if point[0]]
            if points:
                axes.scatter(
                    [x for x, _ in points],
                    [y for _, y in points],
                    color=colour,
                    marker=marker,
                    s=42,
                    label=split,
                    zorder=2,
                )
        for row, name in enumerate(names):
            if count := data.texts[name].tokens["train"]:
                said = f"{count:,}" if count < 10_000_000 else large(count)
                axes.annotate(said, (count, row), (8, 0), textcoords="offset points", va="center", fontsize=9)
        axes.set_xscale("log")
        axes.margins(x=0.12)
        axes.xaxis.set_major_formatter(FuncFormatter(short))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("tokens (logarithmic)")
        axes.grid(axis="x")
        _names(axes, names)
        figure.legend(loc="outside upper left", ncols=3, handletextpad=0.2)
        return as_svg(figure)


def draw_lengths(data: Data) -> bytes:
    """How long the documents and conversations are: a panel a source."""
    found = {name: text.lengths for name, text in sorted(data.texts.items()) if text.lengths}
    found |= {name: chats.lengths for name, chats in sorted(data.chats.items()) if chats.lengths}
    if not found:
        return _nothing("no lengths were counted")
    low = min(min(lengths) for lengths in found.values())
    high = max(max(lengths) for lengths in found.values())
    bins = [1 << k for k in range(low.bit_length() - 1, high.bit_length())]
    if len(found) > MAX_PANELS or _are_long([*found], MAX_NAME + 6):
        return _strips(found, bins, data)
    columns = min(2, len(found))
    rows = math.ceil(len(found) / columns)
    with drawing(0.7 + 1.5 * rows) as figure:
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, name in zip(panels.flat, found, strict=False):
            lengths, total = found[name], sum(found[name].values())
            colour = BLUE if name in data.texts else VERMILION
            axes.bar(range(len(bins)), [lengths[b] / total for b in bins], width=0.85, color=colour)
            axes.set_title(name, fontsize=9, loc="left")
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.grid(axis="y")
        for axes in list(panels.flat)[len(found) :]:
            axes.set_visible(False)
        for axes in panels.flat:
            _mark_bins(axes, bins)
            axes.tick_params(labelbottom=True)
        figure.supxlabel("tokens of a sequence (each bar: from a power of two to the next)", fontsize=9)
        figure.supylabel("share of the sequences", fontsize=9)
        return as_svg(figure)


def _mark_bins(axes: Any, bins: Sequence[int]) -> None:
    marks = range(0, len(bins), math.ceil(len(bins) / 5))
    axes.set_xticks([i - 0.5 for i in marks], [binary(bins[i]) for i in marks])


def _strips(found: Mapping[str, Mapping[int, int]], bins: Sequence[int], data: Data) -> bytes:
    """The lengths of many sources: a strip each, in a colour that is the stronger the more are so long."""
    with drawing(0.9 + _rows_inches([*found])) as figure:
        axes = figure.subplots()
        for row, (name, lengths) in enumerate(found.items()):
            colour = BLUE if name in data.texts else VERMILION
            for place, size in enumerate(bins):
                if share := lengths.get(size, 0) / max(lengths.values()):
                    axes.barh(row, 1, left=place - 0.5, height=0.6, color=colour, alpha=max(share, 0.05))
        _mark_bins(axes, bins)
        axes.set_xlabel("tokens of a sequence (the stronger its colour, the more)")
        _names(axes, [*found])
        return as_svg(figure)


def draw_mix(data: Data) -> bytes:
    """The share of each corpus in each phase: in the data, asked for, and realised."""
    if not data.mixes:
        return _nothing("no phases")
    largest: dict[str, float] = {}
    for shares in data.mixes.values():
        for s in shares:
            largest[s.corpus] = max(largest.get(s.corpus, 0.0), s.asked, s.realised, s.present)
    ordered = sorted(largest, key=lambda name: (-largest[name], name))
    styles = [(colour, hatch) for hatch in ("", "////") for colour in COLOURS]
    named = sorted(ordered if len(ordered) <= len(styles) else ordered[: len(styles) - 1])
    others = [name for name in ordered if name not in named]
    kinds = (("there", "present"), ("asked", "asked"), ("realised", "realised"))
    lines = [(phase, label, key) for phase in data.mixes for label, key in kinds]
    columns, legend = _legend(named, len(named) + bool(others))
    with drawing(1.0 + legend + ROW_INCHES * 1.3 * len(lines)) as figure:
        axes = figure.subplots()
        places = [row + (row // 3 + 1) * 0.9 for row in range(len(lines))]  # a title above each phase
        ends: list[float] = [0.0] * len(lines)
        bars = [([name], name, style) for name, style in zip(named, styles, strict=False)]
        bars += [(others, f"{len(others)} others", (OTHERS, ""))] if others else []
        for members, label, (colour, hatch) in bars:
            widths: list[float] = [
                sum((getattr(s, key) for s in data.mixes[phase] if s.corpus in members), 0.0)
                for phase, _, key in lines
            ]
            look: dict[str, Any] = {"color": colour, "hatch": hatch, "edgecolor": "white"}
            axes.barh(places, widths, left=ends, height=0.8, label=label, **look)
            for place, width, end in zip(places, widths, ends, strict=True):
                if width >= 0.06:
                    _write_share(axes, end + width / 2, place, width, colour)
            ends = [end + width for end, width in zip(ends, widths, strict=True)]
        for number, phase in enumerate(data.mixes):
            axes.text(0, places[3 * number] - 0.75, phase, weight="bold", va="center")
        axes.set_yticks(places, [label for _, label, _ in lines])
        axes.set_ylim(places[-1] + 0.6, -0.3)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel("share of the training tokens")
        axes.spines.left.set_visible(False)
        figure.legend(loc="outside upper left", ncols=columns, handlelength=1.2)
        return as_svg(figure)


def _legend(names: Sequence[str], entries: int) -> tuple[int, float]:
    """The columns of a legend with such names, and its height."""
    longest = max(map(len, names))
    columns = 3 if longest <= 12 else 2 if longest <= MAX_NAME + 4 else 1
    return columns, 0.2 * math.ceil(entries / columns)


def _write_share(axes: Any, x: float, y: float, share: float, colour: str) -> None:
    """Write a share into a part of a bar of that colour."""
    axes.text(
        *(x, y, f"{share:.0%}"),
        ha="center",
        va="center",
        color="white" if colour in (BLUE, OTHERS) else "black",
        fontsize=9,
        bbox={"facecolor": colour, "edgecolor": "none", "pad": 1},
    )


def draw_removed(data: Data) -> bytes:
    """Rows that were removed, by step and reason."""
    totals: dict[tuple[str, str], int] = defaultdict(int)
    for removed in data.removed.values():
        totals[removed.step, removed.reason] += removed.documents
    if not totals:
        return _nothing("nothing was removed")
    ordered = sorted(totals, key=lambda key: (-totals[key], key))
    shown = ordered[:MAX_REASONS]
    steps = sorted({step for step, _ in shown})
    colours = dict(zip(steps, (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY), strict=False))
    with drawing(1.1 + ROW_INCHES * len(shown)) as figure:
        axes = figure.subplots()
        for step in steps:
            rows = [row for row, key in enumerate(shown) if key[0] == step]
            widths = [totals[shown[row]] for row in rows]
            axes.barh(rows, widths, color=colours.get(step, GREY), height=0.7, label=step)
        for row, key in enumerate(shown):
            axes.annotate(
                *(f"{totals[key]:,}", (totals[key], row), (4, 0)),
                textcoords="offset points",
                va="center",
                fontsize=9,
            )
        axes.set_xscale("log")
        axes.set_xlim(0.7, 3 * max(totals.values()))
        axes.xaxis.set_major_formatter(FuncFormatter(short))
        axes.xaxis.set_minor_locator(NullLocator())
        rest = len(ordered) - len(shown)
        axes.set_xlabel("rows (logarithmic)" + (f"; {rest} rarer reasons are not shown" if rest else ""))
        axes.grid(axis="x")
        _names(axes, [reason if len(reason) <= 34 else f"{reason[:33]}…" for _, reason in shown], 34)
        figure.legend(
            loc="outside upper left", ncols=3, handlelength=1.2, title="removed in the step", alignment="left"
        )
        return as_svg(figure)


def draw_packing(data: Data) -> bytes:
    """How full the packs are, and how much of them is trained on."""
    names = [name for name, chats in sorted(data.chats.items()) if chats.packs]
    if not names:
        return _nothing("no conversations")
    with drawing(1.1 + 2.2 * ROW_INCHES * len(names)) as figure:
        axes = figure.subplots()
        for offset, colour, label, key in (
            (-0.2, BLUE, "packing efficiency: filled part of the packs", "efficiency"),
            (0.2, ORANGE, "trained: tokens that the assistant said", "trained_share"),
        ):
            rows = [row + offset for row in range(len(names))]
            values = [getattr(data.chats[name], key) for name in names]
            axes.barh(rows, values, color=colour, height=0.36, label=label)
            for row, value in zip(rows, values, strict=True):
                axes.annotate(
                    f"{value:.1%}", (value, row), (4, 0), textcoords="offset points", va="center", fontsize=9
                )
        axes.set_xlim(0, 1.08)
        axes.set_xticks([i / 5 for i in range(6)])
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel("share of the tokens")
        axes.grid(axis="x")
        _names(axes, names)
        figure.legend(loc="outside upper left", ncols=1, handlelength=1.2)
        return as_svg(figure)


FIGURES: dict[str, Callable[[Data], bytes]] = {
    "tokens": draw_tokens,
    "lengths": draw_lengths,
    "mix": draw_mix,
    "removed": draw_removed,
    "packing": draw_packing,
}
