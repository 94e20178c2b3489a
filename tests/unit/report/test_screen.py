"""The live view drawn: what is there in 40, 80 and 120 columns, with colours and without."""

from __future__ import annotations

import io
import re
from dataclasses import replace

from snaketron.report.live import Rule, Running, Training, View
from snaketron.report.screen import BLOCKS, curve, drawn, render
from snaketron.tracking.warnings import Warning

import pytest
from rich.console import Console

TEXT = "the gradient norm jumped to 31, 12.0 times the usual 2.6; look at clip_grad, the learning rate"
VIEW = View(
    state="running",
    seconds=770,
    done=12,
    total=4032,
    rules=[
        Rule("sample_corpus", "finished", 3, 3),
        Rule("build_tokenizer", "finished", 1, 1),
        Rule("blend_sft", "waiting", 0, 1),
        Rule("tokenize_shard", "running", 8, 4000),
    ],
    trainings=[
        Training("pretrain/broad", "finished", 196, 196, "", 4.8, [8, 7, 6, 5], 1394.0, 0.0),
        Training("pretrain/focused", "running", 30, 79, "", 4.71234, [9, 8, 7, 6, 5, 4], 211_000.0, 98.0),
        Training("sft", "waiting", 0, 100),
    ],
    running=[Running("pretrain focused", 93.0, "job 4711 RUNNING 1:33 on 4 nodes")]
    + [Running(f"tokenize_shard docs part_{i}", 5.0 + i) for i in range(7)],
    waiting=[("tokens_tokenize_shard  job 4720  PENDING (Priority)", 1), ("sft", 3)],
    seconds_left=5400,
    warning=("pretrain/broad", Warning(120, "gradient", TEXT)),
)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_line_is_wider_than_the_terminal(width: int):
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
    console.print(render(VIEW, width))
    lines = console.export_text().splitlines()
    assert all(len(line.rstrip()) <= width for line in lines)
    assert len(lines) == 2 + 3 + 5 + 6 + 2  # header, warning; rules; trainings; jobs; queue
    said = "\n".join(lines)
    for words in (
        "00:12:50",
        "12/4,032",
        "about 1.5 h left",
        "pretrain/focused",
        "30/79",
        "loss 4.712",
        "8/4,000",
    ):
        assert words in said


def test_a_wide_terminal_has_everything():
    said = "\n".join(drawn(VIEW, 141, 50, colors=False))
    for words in (
        "about 1.5 h left",
        f"! pretrain/broad, step 120: {TEXT}",
        "✓ 2 data stages",
        "loss 4.712  █▇▅▄▂▁  211,000 tokens/s  1.6 min left",
        "▶ pretrain focused  1.6 min  job 4711 RUNNING 1:33 on 4 nodes",
        "▶ and 3 more running",
        "○ tokens_tokenize_shard  job 4720  PENDING (Priority)",
        "○ sft  x 3",
    ):
        assert words in said
    assert "\x1b" not in said


def test_the_bars_are_as_long_as_what_is_done():
    lines = drawn(VIEW, 81, 50, colors=False)
    (focused,) = (line for line in lines if line.startswith("▶ pretrain/focused"))
    bar = re.sub("[^━╌]", "", focused)
    assert bar.count("━") == len(bar) * 30 // 79
    assert {len(line) for line in lines if "━" in line or "╌" in line} == {80}


def test_what_has_no_steps_is_done_when_it_is_finished():
    """Merging adapters, which is to come, had a whole bar."""
    merging = [Training("lora_merged", state) for state in ("waiting", "finished")]
    lines = drawn(View("running", trainings=merging), 81, 50, colors=False)
    assert [set(line) & {"━", "╌"} for line in lines[1:]] == [{"╌"}, {"━"}]


def test_colours_only_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[36m" in "\n".join(drawn(VIEW, 81, 50))
    plain = drawn(VIEW, 81, 50, colors=False)
    assert [re.sub(r"\x1b\[[\d;]*m", "", line) for line in drawn(VIEW, 81, 50)] == plain


@pytest.mark.parametrize("height", [5, 12])
def test_of_a_low_terminal_two_rows_are_left_and_the_most_important_lines_stay(height: int):
    lines = drawn(VIEW, 81, height, colors=False)
    assert len(lines) == height - 2 and lines[0].startswith("▶ running") and lines[1].startswith("! ")


def test_what_failed_comes_before_what_runs_and_what_waits():
    rules = [*VIEW.rules, Rule("pack_sft", "failed", 1, 4)]
    made = replace(VIEW, state="failed", rules=rules, warning=None, failed=[f"part_{i}" for i in range(5)])
    lines = drawn(made, 81, 50, colors=False)
    assert [line for line in lines if line.startswith("✗")][2:] == [
        *("✗ part_0", "✗ part_1", "✗ part_2", "✗ and 2 more failed")
    ]
    assert [line.split()[:2] for line in lines[:5]] == [
        ["✗", "failed"],
        ["✓", "2"],
        ["✗", "pack_sft"],
        ["▶", "tokenize_shard"],
        ["○", "blend_sft"],
    ]


def test_a_time_that_is_only_partly_known_says_so():
    assert "over 1.5 h left" in drawn(replace(VIEW, at_least=True), 81, 50, colors=False)[0]
    assert "time left not known yet" in drawn(replace(VIEW, seconds_left=None), 81, 50, colors=False)[0]


def test_a_curve_of_many_values_is_the_mean_of_each_part():
    assert curve([1.0] * 50 + [3.0] * 50, 2) == BLOCKS[0] + BLOCKS[-1]
    assert curve([1.0, float("nan"), 2.0, float("inf")], 8) == BLOCKS[0] + BLOCKS[-1]


def test_before_the_first_run():
    assert drawn(View(""), 81, 24, colors=False) == ["No run of the workflow in this directory yet."]
