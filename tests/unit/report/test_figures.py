"""The figures of the data report: valid SVG, the same for the same data."""

from __future__ import annotations

from collections import Counter
from xml.etree import ElementTree

from snaketron.report import figures
from snaketron.report.collect import Data, Share, Text, collect

import pytest


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


@pytest.mark.parametrize(
    ("value", "text"),
    [(5, "5"), (999, "999"), (1200, "1.2 k"), (2_500_000, "2.5 M"), (3e9, "3 G"), (1e12, "1 T")],
)
def test_numbers_of_an_axis(value, text):
    assert figures.short(value) == text


def test_powers_of_two_of_an_axis():
    assert [figures.binary(1 << k) for k in (0, 9, 10, 15, 20, 31)] == [
        "1",
        "512",
        "1 Ki",
        "32 Ki",
        "1 Mi",
        "2 Gi",
    ]
