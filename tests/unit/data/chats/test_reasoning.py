"""Reasoning modes: which conversations get one, and what it does to them."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import render_chat
from snaketron.data.chats import conversation as chat
from snaketron.data.chats import reasoning
from snaketron.lineage.record import read
from snaketron.settings.chats import RenderSettings
from tests.unit.data.chats.chat_samples import build_tokenizer, save_tokenizer, write_jsonl
from tests.unit.data.chats.golden import assistant, call, tool, user

import pyarrow.parquet as pq
import pytest

ALL = {"stripped": 0.25, "low_effort": 0.25, "truncated": 0.25, "min_budget": 2}
LONG = "What is two plus two? Two plus two is four. What is the capital of France?"


def settings(seed: int | None = 1, **modes: Any) -> RenderSettings:
    return RenderSettings(
        source="s",
        messages_field="messages",
        tools_field="tools",
        valid_fraction=0.2,
        test_fraction=0.1,
        seed=seed,
        reasoning=modes,  # type: ignore[arg-type]
    )


def thought(i: int) -> list[dict[str, Any]]:
    return [user(f"What is {i}?"), assistant(f"It is {i}.", reasoning_content=f"{i}. {LONG}")]


def mode(i: int, **options: Any) -> str:
    return reasoning.choose(settings(**options), chat.conversation(thought(i)))


def test_shares_are_those_of_the_conversations_with_reasoning():
    modes = Counter(mode(i, stripped=0.03, low_effort=0.02, truncated=0.12) for i in range(4000))
    expected = {"stripped": 120, "low_effort": 80, "truncated": 480, "full": 3320}
    assert all(abs(modes[name] - count) < 4 * count**0.5 for name, count in expected.items()), modes
    assert mode(1) == "full" and mode(1, stripped=1) == "stripped" and mode(1, truncated=1) == "truncated"
    plain = chat.conversation([user("a"), assistant("b")])
    assert reasoning.choose(settings(stripped=1), plain) == "none"


def test_the_seed_decides_and_a_larger_share_keeps_what_was_chosen():
    first = [mode(i, stripped=0.3) for i in range(200)]
    assert first == [mode(i, stripped=0.3) for i in range(200)]
    assert first != [mode(i, stripped=0.3, seed=2) for i in range(200)]
    more = [mode(i, stripped=0.5) for i in range(200)]
    assert all(b == "stripped" for a, b in zip(first, more, strict=True) if a == "stripped")


def test_an_answer_that_would_be_empty_is_not_stripped():
    found = chat.conversation([user("a"), assistant("", reasoning_content="b")])
    assert reasoning.choose(settings(stripped=1), found) == "full"
    found = chat.conversation([user("a"), assistant("", reasoning_content="b", tool_calls=[call({})])])
    assert reasoning.choose(settings(stripped=1), found) == "stripped"


@pytest.mark.parametrize(("position", "budget"), [(0.0, 3), (0.5, 6), (0.999, 9)])
def test_budgets_reach_from_the_least_to_one_less_than_there_is(position, budget):
    """Ten tokens, the least budget three: 3 to 9."""
    tokenizer = build_tokenizer()
    text = "What is two plus two? Two plus two?"
    assert len(tokenizer.encode(text)) == 10
    messages = [user("a"), assistant("b", reasoning_content=text)]
    made = reasoning.cut(tokenizer, messages, 0, 3, position)
    assert made is not None and made.budget == budget
    short = made.messages[1]["reasoning_content"]
    assert text.startswith(short) and len(tokenizer.encode(short)) == budget
    assert messages[1]["reasoning_content"] == text  # the original stays
    assert reasoning.cut(tokenizer, messages, 0, 10, position) is None


def test_only_the_answers_of_a_turn_are_cut_and_all_to_one_budget():
    tokenizer = build_tokenizer()
    messages = [
        *thought(1),
        user("Paris?"),
        assistant("", reasoning_content="Two.", tool_calls=[call({})]),
        tool("rain"),
        assistant("Wet.", reasoning_content=LONG),
    ]
    made = reasoning.cut(tokenizer, messages, 2, 2, 0.5)
    assert made is not None
    changed = [m["reasoning_content"] for m in made.messages if "reasoning_content" in m]
    assert changed[0] == f"1. {LONG}"  # of an earlier turn
    assert changed[1] == "Two."  # shorter than the budget
    assert len(tokenizer.encode(changed[2])) == made.budget < len(tokenizer.encode(LONG))


# ------------------------------------------------------------------------------ in rendered files


def render(tmp_path: Path, files: dict[str, list[Any]], **options: Any) -> tuple[list[dict[str, Any]], Any]:
    tokenizer = tmp_path / "tokenizer"
    if not tokenizer.exists():
        save_tokenizer(tokenizer)
    chats = [
        write_jsonl(tmp_path / name, [{"messages": rows} for rows in part]) for name, part in files.items()
    ]
    made = settings(**options.pop("modes", {})).model_dump() | options
    arguments = ["--chats", *chats, "--settings", json.dumps(made), "--tokenizer", tokenizer]
    arguments += ["--template", tokenizer / "chat_template.jinja"]
    arguments += ["--output", tmp_path / "out.parquet", "--record", tmp_path / "out.json"]
    assert render_chat.main([str(argument) for argument in arguments]) == 0
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    return rows, read(tmp_path / "out.json").counts


def text(row: dict[str, Any]) -> str:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    table = {char: byte for byte, char in bytes_to_unicode().items()}
    tokens = build_tokenizer()
    return bytes(table[char] for i in row["input_ids"] for char in tokens.id_to_token(i)).decode()


def test_modes_are_written_marked_and_counted(tmp_path):
    rows, counts = render(tmp_path, {"a.jsonl": [thought(i) for i in range(80)]}, modes=ALL)
    assert counts["reasoning_modes"] == Counter(row["reasoning_mode"] for row in rows)
    assert len(counts["reasoning_modes"]) == 4
    for i, row in enumerate(rows):
        written, asked = text(row), f"<|im_start|>user\nWhat is {i}?"
        answer = f"It is {i}.<|im_end|>\n"
        full = f"<|im_end|>\n<|im_start|>assistant\n<think>\n{i}. {LONG}\n</think>\n\n{answer}"
        if row["reasoning_mode"] == "full":
            assert written == asked + full
        elif row["reasoning_mode"] == "stripped":
            assert written == f"{asked}<|im_end|>\n<|im_start|>assistant\n{answer}"
        elif row["reasoning_mode"] == "low_effort":
            assert written == f"{asked}\n\n{{reasoning effort: low}}{full}"
        else:
            mark, _, rest = written.removeprefix(asked).partition("}")
            budget = int(mark.removeprefix("\n\n{thinking token budget: "))
            short = rest.split("<think>\n")[1].split("\n</think>")[0]
            assert f"{i}. {LONG}".startswith(short) and rest.endswith(answer)
            assert len(build_tokenizer().encode(f"{i}. {LONG}")) > budget >= 2
            assert abs(len(build_tokenizer().encode(short)) - budget) <= 1  # the template trims it


def test_modes_do_not_depend_on_the_layout_of_the_shards(tmp_path):
    chats = [thought(i) for i in range(60)]
    shuffled = random.Random(0).sample(chats, len(chats))
    whole, _ = render(tmp_path, {"a.jsonl": chats}, modes=ALL)
    parts, _ = render(tmp_path, {"b.jsonl": shuffled[:20], "c.jsonl": shuffled[20:]}, modes=ALL)
    found = [{text(row): (row["reasoning_mode"], row["split"]) for row in rows} for rows in (whole, parts)]
    assert found[0] == found[1] and len(found[0]) == 60


def test_each_turn_has_a_budget_of_its_own_and_a_short_one_stays(tmp_path):
    messages = [*thought(1), user("b"), assistant("c", reasoning_content="d"), *thought(2)]
    modes = {"truncated": 1, "min_budget": 4}
    rows, counts = render(tmp_path, {"a.jsonl": [messages]}, modes=modes, sequences="turn")
    assert [row["reasoning_mode"] for row in rows] == ["truncated", "full", "truncated"]
    assert counts["reasoning_modes"] == {"full": 1, "truncated": 2}
    assert [text(row).count("{thinking token budget: ") for row in rows] == [1, 0, 1]


def test_a_stripped_conversation_is_one_sequence_without_reasoning(tmp_path):
    rows, _ = render(
        tmp_path, {"a.jsonl": [[*thought(1), *thought(2)]]}, modes={"stripped": 1}, sequences="turn"
    )
    assert [(row["turn"], row["reasoning_mode"]) for row in rows] == [(0, "stripped")]
    assert "<think>" not in text(rows[0])
