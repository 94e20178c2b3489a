"""Answers on the page: how many were exact, the first of each kind in sight, the others opened on demand."""

from __future__ import annotations

from pathlib import Path

from snaketron import files
from snaketron.report.answers import answers_part, exact_answers, kinds
from snaketron.report.blocks import Facts, Folded, Quotes, Table, Text
from snaketron.report.overview import summary_part
from snaketron.report.runs import Run, read_run

CALL = "<tool_call>\n{}\n</tool_call>"


def read(root: Path, name: str = "run") -> Run:
    return read_run(root, {}, None, name=name, alone=True)


def answer(directory: Path, step: int, said: list[str], references: list[str]) -> None:
    entries = [
        {"prompt": f"prompt {place}", "reference": reference, "answer": text}
        for place, (reference, text) in enumerate(zip(references, said, strict=True))
    ]
    files.write_json(directory / f"answers/step_{step:07d}.json", entries)


def test_exact_answers_are_counted_by_kind():
    references = ["So.", CALL, CALL, "No."]
    before = [{"reference": r, "answer": a} for r, a in zip(references, ["So.", "So.", "", ""], strict=True)]
    after = [{"reference": r, "answer": a} for r, a in zip(references, ["so.", CALL, CALL, ""], strict=True)]
    found = kinds(before, after)
    assert {name: (one.places, one.before, one.after) for name, one in found.items()} == {
        "calls": ([1, 2], 0, 2),
        "texts": ([0, 3], 1, 0),
    }


def test_the_summary_tells_how_many_answers_are_exact(training, tmp_path: Path):
    """The summary of a checkpoint said it, and the page did not."""
    for stage, exact in (("sft", 3), ("lora", 1)):
        directory = training(stage)
        for step, right in ((0, 0), (40, exact)):
            answer(directory, step, [CALL] * right + ["?"] * (4 - right), [CALL] * 4)
    first = summary_part([read(tmp_path)]).blocks[0]
    assert isinstance(first, Facts)
    facts = dict(first.facts)
    assert facts["Exact answers"] == "3 of 4 calls (sft); 1 of 4 calls (lora)"


def test_answers_of_each_training_are_shown_and_most_are_folded(training, tmp_path: Path):
    """The first twenty prompts were shown, all of SFT, and the rest was said to be SFT's too."""
    for stage in ("sft", "lora"):
        directory = training(stage)
        for step in (0, 40):
            answer(directory, step, ["?"] * 30, ["So.", *[CALL] * 29])
    table, *blocks = answers_part([read(tmp_path)]).blocks
    assert isinstance(table, Table) and table.rows == [
        ["sft", "calls", "29", "0", "0", "0"],
        ["sft", "texts", "1", "0", "0", "0"],
        ["lora", "calls", "29", "0", "0", "0"],
        ["lora", "texts", "1", "0", "0", "0"],
    ]
    for stage, (call, text, folded, left) in (("sft", blocks[:4]), ("lora", blocks[4:])):
        assert isinstance(call, Quotes) and call.title == f"Prompt 2 of {stage}"
        assert isinstance(text, Quotes) and text.title == f"Prompt 1 of {stage}"
        assert isinstance(folded, Folded) and folded.summary == f"18 more prompts of {stage}"
        titles = [quotes.title for quotes in folded.blocks if isinstance(quotes, Quotes)]
        assert titles == [f"Prompt {place} of {stage}" for place in range(3, 21)]
        assert left == Text(f"10 more are in ckpt/{stage}/answers.")


def test_answers_before_the_first_step_are_not_those_of_the_training(training, tmp_path: Path):
    directory = training("sft", outcome="failed")
    answer(directory, 0, ["So."], ["So."])
    run = read(tmp_path)
    (table, quotes) = answers_part([run]).blocks
    assert isinstance(table, Table) and table.rows == [["sft", "texts", "1", "1", "-", "-"]]
    assert isinstance(quotes, Quotes) and len(quotes.texts) == 3
    assert exact_answers(run.stages[0]) == ""


def test_an_answer_that_was_cut_says_so(training, tmp_path: Path):
    """An entry of before has no word of how the answer ended."""
    directory = training("sft")
    cut = {"prompt": "Why?", "reference": "So.", "answer": "Since", "finish_reason": "length"}
    files.write_json(directory / "answers/step_0000040.json", [cut])
    run = read(tmp_path)
    (table, quotes) = answers_part([run]).blocks
    assert isinstance(table, Table) and table.rows == [["sft", "texts", "1", "0", "0", "1"]]
    assert exact_answers(run.stages[0]) == "0 of 1 texts (1 cut)"
    assert isinstance(quotes, Quotes)
    names = [name for name, _ in quotes.texts]
    assert names == ["prompt", "reference", "answer after step 0", "answer after step 40, cut"]
