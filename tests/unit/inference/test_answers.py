"""The prompts that show what tuning did: held-out conversations up to their first answer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import snaketron.model  # noqa: F401  before megatron
from snaketron import files
from snaketron.data.tokenizer import tokenizer_info
from snaketron.inference.answers import Prompt, held_out_prompts, write_answers
from snaketron.train.sft_batches import SftBatches

import pytest

# (id, whether the assistant said it)
QUESTION = [(5, 0), (6, 0), (7, 1), (8, 1)]
TWO_TURNS = [(10, 0), (11, 1), (12, 1), (13, 0), (14, 0), (15, 1)]


@pytest.fixture
def batches(packed_blend, tokenizer_dir: Path, sft_settings):
    def make(packs: list[list[list[tuple[int, int]]]]) -> SftBatches:
        held_out = {"valid": {"a": packs}} if packs else {}
        blend = packed_blend(train={"a": [[QUESTION]]}, **held_out)
        return SftBatches.load(blend, sft_settings()[0], tokenizer_info(tokenizer_dir), eval_samples=4)

    return make


def test_a_prompt_ends_where_the_first_answer_begins(batches):
    """Only the first answer of the first conversation of a pack is asked for."""
    assert held_out_prompts(batches([[TWO_TURNS, QUESTION]]), 1) == [Prompt([10], [11, 12])]
    assert held_out_prompts(batches([[QUESTION, TWO_TURNS]]), 1) == [Prompt([5, 6], [7, 8])]


def test_an_answer_that_ends_the_only_conversation_is_whole(batches):
    assert held_out_prompts(batches([[QUESTION]]), 1) == [Prompt([5, 6], [7, 8])]


def test_each_pack_is_asked_before_one_is_asked_again(batches):
    """Four samples of two packs: a small split is read twice, and each prompt comes once."""
    packs = [[QUESTION], [TWO_TURNS, QUESTION]]
    prompts = held_out_prompts(batches(packs), 9)
    assert sorted(p.input_ids for p in prompts[:2]) == [[5, 6], [10]]
    assert [p.input_ids for p in prompts[2:]] == [[5, 6]]
    assert held_out_prompts(batches(packs), 2) == prompts[:2]


def test_no_held_out_packs_give_no_prompts(batches):
    assert held_out_prompts(batches([]), 2) == []
    assert held_out_prompts(batches([[QUESTION]]), 0) == []


def test_as_many_prompts_are_told_as_there_are(
    batches,
    tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    """It said 40, the number that the configuration asks for, of two prompts and of none."""
    monkeypatch.setattr(
        "snaketron.inference.answers.generate", lambda built, prompts, **_: [[7, 8] for _ in prompts]
    )
    stage = SimpleNamespace(
        tokenizer_directory=tokenizer_dir,
        settings=SimpleNamespace(stage="sft"),
        run=SimpleNamespace(num_samples=40, sample_tokens=4),
        version=SimpleNamespace(answers_after=lambda step: tmp_path / f"{step}.json"),
    )
    caplog.set_level("INFO")
    write_answers(stage, None, 3, batches([[QUESTION], [TWO_TURNS]]))
    assert "sample_tokens" not in caplog.text
    write_answers(stage, None, 5, batches([]))
    assert [m for m in caplog.messages if "answering" in m] == ["sft: answering 2 prompts after step 3"]
    assert len(files.read_json(tmp_path / "3.json")) == 2 and not (tmp_path / "5.json").exists()


def test_answers_of_the_data_that_are_longer_than_those_of_the_model_are_told_before_the_first_step(
    batches,
    tokenizer_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    """No model gives two tokens in one: the count of exact answers was 0, and nothing said why."""
    monkeypatch.setattr(
        "snaketron.inference.answers.generate", lambda built, prompts, **_: [[7] for _ in prompts]
    )
    stage = SimpleNamespace(
        tokenizer_directory=tokenizer_dir,
        settings=SimpleNamespace(stage="lora"),
        run=SimpleNamespace(num_samples=40, sample_tokens=1),
        version=SimpleNamespace(answers_after=lambda step: tmp_path / f"{step}.json"),
    )
    for step in (0, 9):
        write_answers(stage, None, step, batches([[QUESTION], [[(5, 0), (8, 1)]]]))
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "lora: 1 of 2 answers of the data have more than 1 token (lora.sample_tokens), up to 2: those of "
        "the model are cut there, and count as not exact"
    ]
