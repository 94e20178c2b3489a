"""Messages in the forms that raw files have are understood, or refused by name; nothing passes in silence."""

from __future__ import annotations

from datetime import date
from typing import Any

from snaketron.data.chats.conversation import conversation
from snaketron.data.chats.messages import Form, of_arrow, split_thinking
from snaketron.data.chats.unusable import THOUGHTS, Unusable
from tests.unit.data.chats.chat_samples import question
from tests.unit.data.chats.golden import WEATHER, assistant, user

import pytest

OSLO = {"city": "Oslo"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": OSLO}}
TAGS = ("<think>", "</think>")


def answer(**keys: Any) -> dict[str, Any]:
    """The answer of a conversation as templates get it."""
    return conversation([user("a"), {"role": "assistant", **keys}]).messages[1]


def reason(messages: list[Any], **options: Any) -> str:
    with pytest.raises(Unusable) as caught:
        conversation(messages, **options)
    return str(caught.value)


@pytest.mark.parametrize("name", ["arguments", "parameters", "args", "input"])
@pytest.mark.parametrize("value", [OSLO, '{"city": "Oslo"}'])
def test_the_arguments_of_a_call_have_several_names(name, value):
    assert answer(tool_calls=[{"function": {"name": "weather", name: value}}])["tool_calls"] == [CALL]
    assert answer(tool_calls=[{"name": "weather", name: value, "type": "tool_use"}])["tool_calls"] == [CALL]


def test_a_call_with_two_sets_of_arguments_is_malformed():
    call = {"name": "weather", "arguments": {}, "parameters": OSLO}
    expected = "malformed tool call: message 1 has a call with arguments and parameters"
    assert reason([user("a"), assistant(None, tool_calls=[call])]) == expected


@pytest.mark.parametrize(
    ("call", "of"),
    [
        (
            {"name": "weather", "arguments": '{"city": "Oslo", "city": "Bergen"}'},
            " of the arguments in message 1",
        ),
        ('{"name": "weather", "arguments": {"city": "Oslo", "city": "Bergen"}}', ""),
    ],
)
def test_a_call_with_an_argument_twice_is_refused(call, of):
    expected = f"a key that stands twice: the key 'city' stands twice in one object{of}"
    with pytest.raises(Unusable, match=f"^{expected}$"):
        answer(tool_calls=[call])


def test_a_call_of_another_kind_is_malformed():
    call = {"type": "custom", "name": "shell", "input": "ls"}
    assert "a call of type 'custom'" in reason([user("a"), assistant(None, tool_calls=[call])])


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ('{"n": 1e999}', "hold inf, not JSON"),
        ({"of": [{"n": float("nan")}]}, "hold nan, not JSON"),
        (False, "are not an object"),
        ("0", "are not an object"),
        ("[" * 100_000, "are not JSON"),
    ],
)
def test_arguments_that_json_cannot_hold_are_malformed(arguments, what):
    call = {"name": "weather", "arguments": arguments}
    expected = f"malformed tool call: arguments in message 1 {what}"
    assert reason([user("a"), assistant("b", tool_calls=[call])]) == expected


def test_a_call_that_nobody_would_read_is_malformed():
    called = [{"name": "weather", "arguments": "{}"}]
    messages = [user("a"), assistant("Let me see.", function_call=called)]
    assert reason(messages) == "malformed tool call: function_call of message 1 is not an object"
    nameless = {"name": "", "arguments": {}}
    assert "calls a function without a name" in reason([user("a"), assistant("b", tool_calls=[nameless])])


def test_the_older_form_of_a_call_is_a_call_and_its_role_a_tool():
    called = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    messages = [
        user("a"),
        {"role": "assistant", "content": None, "function_call": called},
        {"role": "function", "name": "weather", "content": "rain"},
        {"role": "assistant", "content": "Wet.", "function_call": {"name": None, "arguments": None}},
    ]
    found = conversation(messages, functions=[WEATHER["function"]])
    assert found.messages[1:] == [
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "rain", "name": "weather"},
        {"role": "assistant", "content": "Wet."},
    ]
    assert found.tools == [WEATHER] and not found.unread
    both = assistant("", function_call=called, tool_calls=[CALL])
    assert "has tool_calls and function_call" in reason([user("a"), both])


def test_messages_calls_and_tools_may_be_json_text_one_by_one():
    import json

    call = json.dumps({"function": json.dumps({"name": "weather", "arguments": OSLO})})
    messages = [json.dumps(user("a")), json.dumps(assistant("", tool_calls=[call]))]
    found = conversation(messages, [json.dumps(WEATHER)])
    assert found.messages[1]["tool_calls"] == [CALL] and found.tools == [WEATHER]


@pytest.mark.parametrize("name", ["weight", "train", "loss"])
def test_an_answer_may_be_excluded_from_training(name):
    messages = [*question("a", "b"), *question("c", "d"), *question("e", "f")]
    messages[1] |= {name: 0}
    messages[5] |= {name: False}
    messages[3] |= {name: 1}
    found = conversation(messages)
    assert found.untrained == {1, 5} and found.turns == [(2, 2, 4)]
    assert (
        found.messages
        == conversation([*question("a", "b"), *question("c", "d"), *question("e", "f")]).messages
    )
    assert "neither 0 nor 1: weight of message 1 is 0.5" in reason([user("a"), assistant("b", weight=0.5)])
    assert "every answer the weight 0" in reason([user("a"), assistant("b", weight=0)])


def test_keys_that_only_the_template_could_read_are_named():
    messages = [
        user("a") | {"weight": 1, "name": "Bob", "thinking": "x", "id": "7"},
        assistant("b", refusal=None, audio={"id": "1"}, tool_calls=[CALL | {"index": 0, "cached": True}]),
        {"role": "tool", "content": "c", "name": "weather", "tool_call_id": "1"},
        assistant("d"),
    ]
    expected = {"weight of user", "name", "thinking of user", "audio", "cached of a call"}
    assert conversation(messages).unread == expected
    assert (
        reason([user("a"), assistant(None, refusal="No.")]) == "an empty answer: message 1 has only refusal"
    )


def test_functions_beside_tools_are_named():
    tools, functions = [WEATHER], [{"name": "clock"}]
    messages = [user("a"), assistant("b")]
    found = conversation(messages, tools, functions=functions)
    assert found.tools == tools and found.unread == {"functions of the row"}
    assert not conversation(messages, "[]", functions="null").unread
    assert not conversation(messages, tools, functions=[]).unread


def test_tools_as_text_with_a_number_that_json_does_not_have_are_refused():
    """Python reads NaN, and its JSON would be trained."""
    assert reason([user("a"), assistant("b")], tools='[{"name": "weather", "least": NaN}]') == (
        "tools are not a list of objects: str"
    )


def test_what_a_part_of_text_holds_beside_it_is_named():
    part = {"text": "What is this?", "image": "cat.png", "annotations": []}
    found = conversation([{"role": "user", "content": [part]}, assistant("A cat.")])
    assert found.messages[0]["content"] == "What is this?" and found.unread == {"image of a part of content"}


def test_parts_that_are_not_text_are_refused_by_name():
    parts = [{"type": "text", "text": "a"}, {"type": "thinking", "text": "b"}]
    assert "a part of type 'thinking'" in reason([user("a"), assistant(parts)])


def test_messages_of_other_keys_and_roles_are_read_as_configured():
    rows = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello.", "weight": None}]
    form = Form(role="from", content="value", roles={"human": "user", "gpt": "assistant"})
    assert conversation(rows, form=form).messages == question("Hi", "Hello.")


def test_a_system_message_may_lie_beside_the_messages():
    rules = {"role": "system", "content": "Be brief."}
    found = conversation([*question("a", "b"), *question("c", "d")], system="Be brief.")
    assert found.messages == [rules, *question("a", "b"), *question("c", "d")]
    assert conversation([rules, *question("a", "b")], system="Be brief. ").messages[0] == rules
    assert reason([rules, *question("a", "b")], system="Be long.").startswith("two system messages")
    weighed = [user("a"), assistant("b", weight=0), *question("c", "d")]
    assert conversation(weighed, system="Be brief.").untrained == {2}


@pytest.mark.parametrize(
    ("content", "thought", "said"),
    [
        ("<think>\nHm.\n</think>\n\nTwo.", "Hm.", "Two."),
        ("\n<think>Hm.</think>Two.", "Hm.", "Two."),
        ("<think>\n\n</think>\n\nTwo.", "", "Two."),
        ("Hm.\n</think>\n\n  Two.", "Hm.", "  Two."),
        ("Two.", None, "Two."),
        ("The tag </think> ends it.", None, "The tag </think> ends it."),
        ("Like `<think>a</think>`:\n</think>\n", None, "Like `<think>a</think>`:\n</think>\n"),
    ],
)
def test_thinking_at_the_beginning_of_a_content_is_told_from_the_answer(content, thought, said):
    assert split_thinking(content, TAGS, 1) == (thought, said)


@pytest.mark.parametrize(
    "content", ["<think>Hm.", "<think>a</think>b<think>c</think>d", "<think>a<think>b</think>c"]
)
def test_thinking_that_cannot_be_told_from_the_answer_is_refused(content):
    assert reason([user("a"), assistant(content)], form=Form(thinking=TAGS)).startswith(THOUGHTS)
    assert conversation([user("a"), assistant(content)]).messages[1]["content"] == content


def test_reasoning_that_is_given_twice_is_the_same_or_refused():
    both = assistant("<think>Hm.</think>Two.", reasoning_content="Hm.\n", thinking="Hm.")
    found = conversation([user("a"), both], form=Form(thinking=TAGS))
    assert found.messages[1] == assistant("Two.", reasoning_content="Hm.\n") and found.num_thoughts == 1
    other = assistant("Two.", reasoning_content="Hm.", reasoning="Ha.")
    assert reason([user("a"), other]).startswith(THOUGHTS)


def test_the_keys_of_a_map_are_texts():
    """Of Hive, which writes all text as bytes, of a map of numbers and of one of days."""
    maps = [(b"city", b"Oslo")], [(3, "three")], [(date(2026, 1, 31), "Saturday")]
    assert [of_arrow(one) for one in maps] == [{"city": "Oslo"}, {"3": "three"}, {"2026-01-31": "Saturday"}]
    call = assistant("", tool_calls=[{"name": "weather", "arguments": of_arrow([*maps[0], *maps[2]])}])
    found = conversation([user("a"), call])
    assert b'{"city":"Oslo","2026-01-31":"Saturday"}' in found.json


def test_keys_that_arrow_filled_with_null_are_left_out_at_any_depth():
    """A column of calls to weather(city) and dice(sides) gives each call both keys."""
    call = {"name": "dice", "arguments": {"sides": 6, "city": None, "more": [{"a": None, "b": 0}]}}
    assert of_arrow([call, None]) == [
        {"name": "dice", "arguments": {"sides": 6, "more": [{"b": 0}]}},
        None,
    ]
