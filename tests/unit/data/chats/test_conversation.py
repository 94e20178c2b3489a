"""Conversations are checked and brought into one form, and a mask lies on their tokens."""

from __future__ import annotations

from snaketron.data.chats import conversation, unusable
from snaketron.data.chats.mask import tokenize
from tests.unit.data.chats.chat_samples import build_tokenizer, question
from tests.unit.data.chats.golden import WEATHER, assistant, call, tool, user

import pytest


def test_a_token_that_holds_any_of_the_answer_is_trained():
    tokenizer = build_tokenizer()
    text = "The capital"
    assert tokenizer.encode(text).tokens[-1] == "Ġcapital"
    assert tokenize(tokenizer, text, [(4, 11)])[1].tolist() == [0, 0, 1]  # the space lies outside
    assert tokenize(tokenizer, text, [(3, 11)])[1].tolist() == [0, 0, 1]
    assert tokenize(tokenizer, text, [(4, 5)])[1].tolist() == [0, 0, 1]
    assert tokenize(tokenizer, text, [(0, 3)])[1].tolist() == [1, 1, 0]


def test_spaces_before_an_answer_are_not_trained_where_offsets_leave_spaces_out():
    tokenizer = build_tokenizer(trim_offsets=True)
    text = "is  <|im_end|>"
    spaces = [
        o
        for o, t in zip(tokenizer.encode(text).offsets, tokenizer.encode(text).tokens, strict=True)
        if "Ġ" in t
    ]
    assert spaces and all(start == end for start, end in spaces)
    assert tokenize(tokenizer, text, [(4, 14)])[1].tolist() == [0] * len(spaces) + [0, 1]


@pytest.mark.parametrize(
    ("messages", "tools", "reason"),
    [
        ([], None, "no messages"),
        (None, None, "no messages"),
        ({"role": "user"}, None, "messages are not a list"),
        ([user("a")], None, "no assistant message"),
        ([{"from": "human", "value": "a"}], None, "a message without a role"),
        ([{"role": "human", "content": "a"}], None, "unknown role"),
        ([user(7), assistant("b")], None, "content that is not text"),
        ([user([{"type": "image"}]), assistant("b")], None, "content that is not text"),
        ([user("a"), assistant(" ")], None, "an empty answer"),
        ([user("a"), assistant(None, tool_calls=[{"function": {}}])], None, "malformed tool call"),
        ([user("a"), assistant(None, tool_calls=[call("{city: 1}")])], None, "malformed tool call"),
        ([user("a"), assistant(None, tool_calls=[call("[1]")])], None, "malformed tool call"),
        (question("a", "b"), "weather", "tools are not a list of objects"),
        (question("a", "b"), ["weather"], "tools are not a list of objects"),
    ],
)
def test_an_unusable_conversation_says_why(messages, tools, reason):
    with pytest.raises(unusable.Unusable) as caught:
        conversation.conversation(messages, tools)
    assert caught.value.reason == reason


def test_messages_and_tools_may_be_json_text():
    checked = conversation.conversation('[{"role": "assistant", "content": "b"}]', '[{"type": "function"}]')
    assert checked == conversation.Conversation([assistant("b")], [{"type": "function"}])
    assert conversation.conversation(question("a", "b"), "[]").tools is None


def test_a_conversation_comes_out_in_one_form():
    """Whatever way it is written: null columns of Parquet, parts, JSON text, a bare call, other names."""
    messages = [
        {"role": "system", "content": None, "name": None},
        user(["a", {"type": "text", "text": "b"}]) | {"tool_calls": None},
        {"role": "assistant", "thinking": "hm", "tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]},
        tool("r") | {"tool_call_id": "1"},
        assistant("c", tool_calls=[], reasoning_content=" "),
    ]
    assert conversation.conversation(messages).messages == [
        {"role": "system", "content": ""},
        {"role": "user", "content": "ab"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
        },
        {"role": "tool", "content": "r", "tool_call_id": "1"},
        {"role": "assistant", "content": "c"},
    ]


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ("ua", [(1, 0, 2)]),
        ("uaua", [(1, 0, 2), (2, 2, 4)]),
        ("suuatau", [(1, 0, 6)]),
        ("aua", [(1, 0, 3)]),
        ("uasuau", [(1, 0, 2), (2, 3, 5)]),
        ("uuaau", [(1, 0, 4)]),
        ("uuuaua", [(1, 0, 4), (2, 4, 6)]),
    ],
)
def test_turns_reach_from_the_user_to_the_last_answer(roles, expected):
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    messages = [{"role": names[role], "content": "x"} for role in roles]
    assert conversation.conversation(messages).turns == expected


@pytest.mark.parametrize("token", ['<|"|>', "<|\\|>"])
def test_a_control_token_that_json_escapes_is_found(token):
    """Gemma 4 writes the texts of calls between two of the first."""
    pattern = conversation.control_tokens(build_tokenizer(added=[token]))
    for text in ("<|", '"', "\\", '|>"', '<|\\"|>'):
        conversation.check_text(conversation.Conversation(question(text, "|>"), None), pattern)
    with pytest.raises(unusable.Unusable, match="control token"):
        conversation.check_text(conversation.Conversation(question(f"a{token}", "b"), None), pattern)


@pytest.mark.parametrize("place", ["messages", "tools"])
def test_text_that_holds_a_control_token_is_unusable(place):
    pattern = conversation.control_tokens(build_tokenizer())
    assert pattern is not None
    conversation.check_text(conversation.Conversation(question("<b>", "b"), [WEATHER]), pattern)
    thinks = conversation.Conversation(question("<think>", "b"), [WEATHER])
    conversation.check_text(thinks, conversation.control_tokens(build_tokenizer(), {"<think>", "</think>"}))
    bad = (
        conversation.Conversation(question("a<|im_end|>", "b"), None)
        if place == "messages"
        else conversation.Conversation(question("a", "b"), [{"name": "<|im_start|>"}])
    )
    with pytest.raises(unusable.Unusable, match="control token"):
        conversation.check_text(bad, pattern)


@pytest.mark.parametrize("text", ["\ufdd0", "\ufdd1x\ufdd0", "\ud800"])
def test_text_that_is_no_unicode_text_is_unusable(text):
    with pytest.raises(unusable.Unusable, match="not Unicode text"):
        conversation.check_text(conversation.conversation(question("a", text)), None)


def test_a_number_of_many_digits_is_no_problem():
    found = conversation.conversation([user("a"), assistant(None, tool_calls=[call({"n": 10**30})])])
    conversation.check_text(found, None)
