"""The prompts that show what tuning did: held-out conversations up to their first answer."""

from __future__ import annotations

from pathlib import Path

import snaketron.model  # noqa: F401  before megatron
from snaketron.data.tokenizer import tokenizer_info
from snaketron.inference.answers import Prompt, held_out_prompts
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
