"""Curves: small, with spikes, in the colours of the page, and in words."""

from __future__ import annotations

import re

from snaketron.report.charts import MAX_POINTS, Curve, draw, thinned


def test_a_spike_stays_when_points_are_left_out():
    points = [(float(step), 100.0 if step == 54_321 else 1.0) for step in range(100_000)]
    kept = thinned(points)
    assert len(kept) <= MAX_POINTS and (54_321.0, 100.0) in kept and kept == sorted(kept)


def test_a_drawing_has_the_colours_of_the_page():
    figure = draw("Loss", [Curve("training", [(1, 7.5), (2, 3.25), (3, 4.0)])])
    assert figure and "var(--ink)" in figure.svg and "#333333" not in figure.svg.lower()
    assert not re.search(r"http|<style|<metadata", figure.svg)
    assert len(figure.svg) < 20_000


def test_a_drawing_is_told_in_words():
    figure = draw("Loss", [Curve("training", [(1, 7.5), (2, 3.25), (3, 4.0)])])
    assert figure and figure.alt == (
        "Loss: training from 7.5 at step 1 to 4 at step 3, lowest 3.25 at 2, highest 7.5 at 1."
    )


def test_counts_that_are_all_zero_have_no_scale_below_it():
    figure = draw("Experts", [Curve("", [(1, 0.0), (2, 0.0)])])
    assert figure and "\N{MINUS SIGN}" not in figure.svg and "0.2" in figure.svg


def test_there_is_no_drawing_without_points():
    assert draw("Loss", [Curve("training", [])]) is None
