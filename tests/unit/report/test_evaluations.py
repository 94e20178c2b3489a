"""Evaluations beside each other, as a table."""

from __future__ import annotations

from pathlib import Path

from snaketron.files import write_json
from snaketron.log import UserError
from snaketron.report.evaluations import markdown, read_evaluations

import pytest


def test_each_checkpoint_has_a_column(tmp_path: Path):
    """The base has no exact answers, and its text is of one corpus."""
    base = {"stage": "pretrain/one", "text": {"docs": {"loss": 5.0, "bits_per_byte": 1.5}}}
    tuned = {
        "stage": "sft",
        "text": {"docs": {"loss": 5.25, "bits_per_byte": None}},
        "answers": {"tools": {"calls": {"asked": 8, "exact": 6, "cut": 0, "share": 0.75}}},
        "tasks": {"arc_easy": {"acc": 0.5, "questions": 10}},
    }
    write_json(tmp_path / "base.json", base)
    write_json(tmp_path / "sft.json", tuned)
    assert markdown(read_evaluations([tmp_path / "base.json", tmp_path / "sft.json"])).splitlines() == [
        "| data     | measure            | pretrain/one |    sft |",
        "|----------|--------------------|-------------:|-------:|",
        "| docs     | loss               |       5.0000 | 5.2500 |",
        "| docs     | bits a byte        |       1.5000 |        |",
        "| tools    | exact calls (of 8) |              |  75.0% |",
        "| arc_easy | acc                |              | 0.5000 |",
    ]


def test_a_file_of_lm_eval_is_a_column(tmp_path: Path):
    """The task by our own LM, and through the export; errors of estimates are not compared."""
    write_json(tmp_path / "own.json", {"stage": "sft", "tasks": {"arc_easy": {"acc": 0.5, "questions": 10}}})
    measures = {"alias": "arc_easy", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 10}
    there = {"results": {"arc_easy": measures}, "model_name": "hf/sft"}
    write_json(tmp_path / "hf.json", there)
    assert markdown(read_evaluations([tmp_path / "own.json", tmp_path / "hf.json"])).splitlines() == [
        "| data     | measure |    sft | hf/sft |",
        "|----------|---------|-------:|-------:|",
        "| arc_easy | acc     | 0.5000 | 0.5000 |",
    ]


def test_two_evaluations_of_one_stage_are_told_apart_by_their_files(tmp_path: Path):
    for name, loss in (("old/sft", 5.0), ("sft", 4.0), ("base", 6.0)):
        stage = name.rpartition("/")[2]
        write_json(tmp_path / f"{name}.json", {"stage": stage, "text": {"docs": {"loss": loss}}})
    paths = [tmp_path / f"{name}.json" for name in ("base", "old/sft", "sft")]
    head, _, row = markdown(read_evaluations(paths)).splitlines()
    names = ["base", f"sft ({paths[1]})", f"sft ({paths[2]})"]
    assert [name.strip() for name in head.split("|")[3:-1]] == names
    assert row.split() == ["|", "docs", "|", "loss", "|", "6.0000", "|", "5.0000", "|", "4.0000", "|"]


def test_answers_that_were_cut_are_shown_where_there_are_any(tmp_path: Path):
    """Two of eight calls of a were as long as an answer may be, and none of b and c."""
    for name, cut in (("a", 2), ("b", 0), ("c", 0)):
        calls = {"asked": 8, "exact": 4, "cut": cut, "share": 0.5}
        write_json(tmp_path / f"{name}.json", {"stage": name, "answers": {"tools": {"calls": calls}}})

    def table(*names: str) -> list[str]:
        return markdown(read_evaluations([tmp_path / f"{name}.json" for name in names])).splitlines()[2:]

    assert table("a", "b", "c") == [
        "| tools | exact calls (of 8) | 50.0% | 50.0% | 50.0% |",
        "| tools | cut calls (of 8)   | 25.0% |  0.0% |  0.0% |",
    ]
    assert table("b", "c") == ["| tools | exact calls (of 8) | 50.0% | 50.0% |"]


def test_what_is_no_evaluation_is_refused(tmp_path: Path):
    write_json(tmp_path / "a.json", {"stage": "sft"})
    write_json(tmp_path / "b.json", {"phase": "one"})
    with pytest.raises(UserError, match=r"b\.json: not an evaluation"):
        read_evaluations([tmp_path / "b.json"])
    with pytest.raises(UserError, match=r"nowhere\.json: no such file"):
        read_evaluations([tmp_path / "nowhere.json"])
    with pytest.raises(UserError, match=r"a\.json: named twice"):
        read_evaluations([tmp_path / "a.json", tmp_path / "a.json"])
