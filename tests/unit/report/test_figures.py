"""The figures of the data report: valid SVG, the same for the same data."""

from __future__ import annotations

from collections import Counter
from xml.etree import ElementTree

from snaketron.report import figures
from snaketron.report.collect import Data, Share, Text, collect


def test_the_figures_are_svg_and_the_same_each_time(records):
    data = collect(records)
    for draw in figures.FIGURES.values():
        svg = draw(data)
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert draw(collect(records)) == svg


def test_every_figure_is_there_without_data():
    for draw in figures.FIGURES.values():
        assert ElementTree.fromstring(draw(Data())).tag.endswith("svg")


def test_more_corpora_than_colours_are_drawn():
    data = Data()
    for i in range(20):
        data.texts[f"c{i}"] = Text(tokens=Counter(train=10**i), lengths=Counter({1 << i: 1}))
    shares = [Share(f"c{i}", 0.05, 0.05, 0.05, 1, 1, 1.0, False) for i in range(20)]
    data.mixes["broad"] = shares
    for name in ("tokens", "lengths", "mix"):
        assert ElementTree.fromstring(figures.FIGURES[name](data)).tag.endswith("svg")
