"""Sequences of turns, and which answers and reasoning are trained."""

from __future__ import annotations

from tests.unit.data.chats.chat_samples import question, write_jsonl
from tests.unit.data.chats.rendering import (
    OTHER,
    THREE_TURNS,
    refused,
    render,
    texts,
)

START = "<|turn|>system\nBe helpful.<|stop|>\n\n"


def said(who: str, text: str) -> str:
    return f"<|turn|>{who}\n{text}<|stop|>\n\n"


def test_a_turn_is_what_inference_sees_and_only_its_answers_are_trained(tmp_path, other_tokenizer):
    """The history is shortened as when that turn is answered, and nothing follows its answers."""
    options = {"template": OTHER, "sequences": "turn"}
    rows, record = render(tmp_path, [{"messages": THREE_TURNS}, {"messages": question("a", "b")}], **options)
    one = START + said("user", "One?")
    two = one + said("assistant", "<think></think>1") + said("user", "Two?")
    three = two + said("assistant", "<think></think>2") + said("user", "Three?")
    assert [text.rstrip() for text in texts(rows)] == [
        f"{one}<|turn|>assistant\n<think>\n⟦First.\n</think>\n1<|stop|>⟧",
        f"{two}<|turn|>assistant\n<think></think>⟦2<|stop|>⟧",
        f"{three}<|turn|>assistant\n<think>\n⟦Third.\n</think>\n3<|stop|>⟧",
        f"{START}{said('user', 'a')}<|turn|>assistant\n<think></think>⟦b<|stop|>⟧",
    ]
    assert [(row["row"], row["turn"]) for row in rows] == [(1, 1), (1, 2), (1, 3), (2, 0)]
    assert [row["reasoning_mode"] for row in rows] == ["full"] * 3 + ["none"]
    counts = record.counts
    assert (counts["rows"], counts["conversations"], counts["sequences"]) == (2, 2, 4)
    assert counts["reasoning_modes"] == {"none": 1, "full": 3}


def test_a_conversation_in_one_has_the_history_of_its_last_answer(tmp_path, other_tokenizer):
    """What follows the last answer is left out: it would make that answer part of the history."""
    rows, _ = render(tmp_path, [{"messages": THREE_TURNS}], template=OTHER)
    assert [text.rstrip() for text in texts(rows)] == [
        START
        + said("user", "One?")
        + "<|turn|>assistant\n<think></think>⟦1<|stop|>⟧\n\n"
        + said("user", "Two?")
        + "<|turn|>assistant\n<think></think>⟦2<|stop|>⟧\n\n"
        + said("user", "Three?")
        + "<|turn|>assistant\n<think>\n⟦Third.\n</think>\n3<|stop|>⟧"
    ]


def test_turns_of_a_template_with_generation_blocks(tmp_path, tokenizer):
    rows, _ = render(tmp_path, [{"messages": THREE_TURNS[:4]}], sequences="turn")
    first = "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
    second = "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
    assert texts(rows, ()) == [
        f"{first}⟦<think>\nFirst.\n</think>\n\n1<|im_end|>⟧\n",
        f"{first}<think>\nFirst.\n</think>\n\n1<|im_end|>\n{second}⟦2<|im_end|>⟧\n",
    ]


def test_turns_of_a_template_that_hides_its_loop_are_an_error(tmp_path, tokenizer):
    template = tmp_path / "macro.jinja"
    template.write_text(
        "{% macro all() %}{% for m in messages %}{{ m.role }}: {% if m.role == 'user' %}{{ m.content }}"
        "{% else %}{% generation %}{{ m.reasoning_content }}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% endif %}{% endfor %}{% endmacro %}{{ all() }}"
    )
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": THREE_TURNS}])
    message = refused(tmp_path, chats, template=template, sequences="turn")
    assert message.startswith("macro.jinja: `sequences: turn` needs a template that loops over `messages`")


def test_all_sequences_of_a_conversation_share_a_split(tmp_path, tokenizer):
    """The split is that of the whole conversation, whatever becomes of it."""
    chats = [{"messages": [*question(f"What is {i}?", "x"), *THREE_TURNS]} for i in range(60)]
    whole, _ = render(tmp_path, chats)
    expected = {row["row"]: row["split"] for row in whole}
    assert len(set(expected.values())) == 3
    modes = {"stripped": 0.4, "low_effort": 0.3, "truncated": 0.3, "min_budget": 1}
    for options in ({"sequences": "turn"}, {"sequences": "turn", "reasoning": modes}, {"reasoning": modes}):
        rows, counts = render(tmp_path, chats, seed=1, **options)
        assert {(row["row"], row["split"]) for row in rows} == set(expected.items())
        by_split = counts.counts["splits"]
        assert sum(split["conversations"] for split in by_split.values()) == 60


def test_limits_count_conversations_and_not_turns(tmp_path, tokenizer):
    chats = [{"messages": THREE_TURNS}] * 4
    rows, _ = render(tmp_path, chats, sequences="turn", max_documents=2)
    assert [(row["row"], row["turn"]) for row in rows] == [(r, t) for r in (1, 2) for t in (1, 2, 3)]
    most = sum(len(row["input_ids"]) for row in rows) + 5
    assert render(tmp_path, chats, sequences="turn", max_tokens=most)[0] == rows


def test_a_template_without_reasoning_trains_the_answers_and_says_so(tmp_path, tokenizer, caplog):
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}{{ m.role }} {{ m.content }}<|im_end|>{% endfor %}")
    only = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "reasoning_content": "b"}]
    rows, record = render(
        tmp_path,
        [{"messages": THREE_TURNS}, {"messages": only}],
        template=template,
        max_dropped_fraction=0.5,
    )
    assert [row["reasoning_mode"] for row in rows] == ["none"]
    assert record.counts["reasoning_not_written"] == 1
    assert record.counts["dropped"] == {"the template leaves out a message": 1}
    assert "writes no reasoning; 1 conversations are trained without theirs" in caplog.text


THINKS = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "<think>\nFirst.\n</think>\n\n1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "<think>\nSecond.\n</think>\n\n2"},
]


def test_thinking_in_the_content_is_reasoning_counted_and_split_by_turn(tmp_path, tokenizer, caplog):
    first = "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"
    rows, record = render(tmp_path, [{"messages": THINKS}], sequences="turn")
    assert texts(rows, ())[0] == f"{first}⟦<think>\nFirst.\n</think>\n\n1<|im_end|>⟧\n"
    assert [(row["turn"], row["reasoning_mode"]) for row in rows] == [(1, "full"), (2, "full")]
    assert record.counts["thinking_in_content"] == 2
    assert "2 answers have their thinking in the content; it is taken for reasoning" in caplog.text
    rows, record = render(tmp_path, [{"messages": THINKS}], thinking_tags=None)
    assert [row["reasoning_mode"] for row in rows] == ["none"] and "<think>" in texts(rows, ())[0]
    assert "thinking_in_content" not in record.counts


def test_reasoning_that_the_template_leaves_out_of_the_history_is_counted(tmp_path, other_tokenizer, caplog):
    rows, record = render(tmp_path, [{"messages": THINKS}], template=OTHER)
    assert "First." not in texts(rows)[0] and "Second." in texts(rows)[0]
    assert record.counts["reasoning_left_out"] == 1
    assert (
        "1 answers are trained without their reasoning" in caplog.text and "`sequences: turn`" in caplog.text
    )
    caplog.clear()
    _, record = render(tmp_path, [{"messages": THINKS}], template=OTHER, sequences="turn")
    assert "reasoning_left_out" not in record.counts and "without their reasoning" not in caplog.text


def test_an_answer_of_weight_0_is_not_trained_and_counted(tmp_path, tokenizer, caplog):
    bad = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Bad.", "weight": 0}]
    rows, record = render(tmp_path, [{"messages": [*bad, *question("Again", "Good."), *bad]}])
    assert texts(rows, ()) == [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nBad.<|im_end|>\n"
        "<|im_start|>user\nAgain<|im_end|>\n<|im_start|>assistant\n⟦Good.<|im_end|>⟧\n"
    ]
    assert record.counts["untrained_answers"] == 2
    assert "2 answers have the weight 0 and are not trained" in caplog.text


def test_turns_without_a_trained_answer_are_no_sequences(tmp_path, tokenizer):
    messages = [message | ({"weight": 0} if i == 1 else {}) for i, message in enumerate(THREE_TURNS)]
    rows, _ = render(tmp_path, [{"messages": messages}], sequences="turn")
    assert [row["turn"] for row in rows] == [2, 3]
    assert [text.count("⟦") for text in texts(rows, ())] == [1, 1]
