"""Templates that train what must not be trained, or leave out what was said."""

from __future__ import annotations

from snaketron.data.chats import conversation, unusable
from snaketron.data.chats.template import Template
from snaketron.log import UserError
from tests.unit.data.chats.chat_samples import question
from tests.unit.data.chats.golden import (
    LOOP,
    OFF,
    PROMPT,
    WEATHER,
    assistant,
    call,
    compiled,
    marked,
    tool,
    user,
)

import pytest


def test_a_text_that_inference_does_not_ask_for_is_refused():
    """This one names the date in every prompt, but not in what it writes afterwards."""
    source = LOOP + "{% if add_generation_prompt %}<|assistant|>{{ messages | length }}. {% endif %}"
    made = Template(source, name="my.jinja", off_arguments=OFF)
    messages = question("a", "b")
    with pytest.raises(
        UserError, match=r"message 1 of a conversation is not written as inference asks for it"
    ):
        made.check(messages, None, None, made.render(messages))
    fits = compiled("other")
    fits.check(messages, None, OFF, fits.render(messages, None, OFF))


CALLS_BY_NAME = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for call in m.tool_calls %}"
    "{{ call.function.name }}{% endfor %}<|end|>{% endfor %}" + PROMPT
)


def test_a_call_without_arguments_needs_no_more_than_its_name():
    made = conversation.conversation([user("a"), assistant("", tool_calls=[call({})])])
    assert Template(CALLS_BY_NAME).render(made.messages).text == "<|user|>a<|end|><|assistant|>weather<|end|>"


@pytest.mark.parametrize(
    ("source", "messages", "reason"),
    [
        (LOOP, [user("a"), assistant("", tool_calls=[call({})])], unusable.LEFT_OUT),
        (
            "{% for m in messages if m.role != 'tool' %}{{ m.content }}{{ m.tool_calls }}<|end|>{% endfor %}",
            [user("a"), assistant("", tool_calls=[call({})]), tool("r"), assistant("b")],
            unusable.LEFT_OUT,
        ),
        (
            "{% for m in messages if m.role != 'system' %}{{ m.content }}<|end|>{% endfor %}",
            [{"role": "system", "content": "s"}, *question("a", "b")],
            unusable.LEFT_OUT,
        ),
        (
            CALLS_BY_NAME,
            [user("a"), assistant("", tool_calls=[call({"city": "Rome"})])],
            unusable.LEFT_OUT,
        ),
        (
            LOOP.replace("<|{{", "{{ 'x' if m.content == 'b' }}<|{{") + PROMPT,
            question("a", "b"),
            unusable.NO_PROMPT,
        ),
        (  # the header of an answer would be trained, as the end of a call
            "{% for m in messages %}<|{{ m.role }}|>{% if m.tool_calls %}{{ m.tool_calls }}<|end|>"
            "<|assistant|>{% endif %}{{ m.content }}<|end|>{% endfor %}" + PROMPT,
            [user("a"), assistant("", tool_calls=[call({})])],
            unusable.NO_PROMPT,
        ),
    ],
)
def test_a_conversation_that_is_not_written_whole_is_unusable(source, messages, reason):
    with pytest.raises(unusable.Unusable) as caught:
        Template(source).render(conversation.conversation(messages).messages)
    assert caught.value.reason == reason


def test_a_role_that_needs_tools_is_tried_with_tools():
    source = (
        "{% for m in messages %}{% if m.role == 'tool' and not tools %}{{ raise_exception('no tools') }}"
        "{% endif %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}" + PROMPT
    )
    assert "tool" in Template(source).roles and "developer" in Template(source).roles


HEAD = "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}<|end|>{% else %}"

TAIL = "{% endif %}{% endfor %}" + PROMPT


def test_a_role_header_inside_the_generation_block_is_refused():
    source = HEAD + "{% generation %}<|assistant|>{{ m.content }}<|end|>{% endgeneration %}" + TAIL
    with pytest.raises(UserError, match=r"'<\|assistant\|>' lies in the generation block"):
        Template(source).check_marks()
    right = HEAD + "<|assistant|>{% generation %}{{ m.content }}<|end|>{% endgeneration %}" + TAIL
    Template(right).check_marks()
    # what opens thinking may be trained although the prompt has it, too
    thinks = right.replace("{% generation %}", "{% generation %}<think></think>")
    Template(thinks.replace(PROMPT, PROMPT.replace("|>{", "|><think>{"))).check_marks()


def test_text_between_the_prompt_and_the_generation_block_is_refused():
    """The model is not given it, and would not learn to write it."""
    source = HEAD + "<|assistant|>Sure: {% generation %}{{ m.content }}<|end|>{% endgeneration %}" + TAIL
    made, messages = Template(source), question("a", "b")
    with pytest.raises(UserError, match=r"before it stands .*Sure: ', but inference gives"):
        made.check(messages, None, None, made.render(messages))


@pytest.mark.parametrize("marks", [True, False])
def test_a_call_that_the_template_leaves_out_is_noticed(marks):
    """It writes the first call only; both call the same function."""
    said = "{{ m.content }}{% for c in m.tool_calls %}{% if loop.first %}{{ c.function | tojson }}{% endif %}"
    said += "{% endfor %}<|end|>"
    block = "{% generation %}" + said + "{% endgeneration %}" if marks else said
    template = Template(HEAD + "<|assistant|>" + block + TAIL)
    one, two = call({"city": "Oslo"}), call({"city": "Bergen"})
    assert "Oslo" in template.render([user("a"), assistant("", tool_calls=[one])]).text
    with pytest.raises(unusable.Unusable, match="a tool call of message 1"):
        template.render([user("a"), assistant("", tool_calls=[one, two])])
    with pytest.raises(unusable.Unusable, match="all calls of message 1 but the first"):
        template.render([user("a"), assistant("weather, weather", tool_calls=[one, two])])
    silent = HEAD.replace("{{ m.content }}<|end|>{% else %}", "<|end|>{% else %}") + "<|assistant|>" + block
    with pytest.raises(unusable.Unusable, match="the content of message 0"):
        Template(silent + TAIL).render(question("xyz", "b"))


def test_a_template_that_needs_tools_is_tried_with_tools():
    source = LOOP + "{% for tool in tools %}{{ tool.function.name | upper }}{% endfor %}" + PROMPT
    source = source.replace("{% for m", "{{ tools | length }}{% for m")
    made = Template(source)
    assert marked(made.render(question("a", "b"), [WEATHER])) == (
        "1<|user|>a<|end|>\n<|assistant|>⟦b<|end|>⟧\nWEATHER"
    )
    with pytest.raises(unusable.Unusable, match="the template refuses it"):
        made.render(question("a", "b"))


def test_a_prompt_that_opens_thinking_before_an_answer_without_any_is_accepted_and_noted():
    """At inference stands <think></think> before the answer; the text of the answer has none."""
    prompt = "{% if add_generation_prompt %}<|assistant|><think>\n\n</think>\n\n{% endif %}"
    made, messages = Template(LOOP + prompt), question("a", "b")
    rendered = made.render(messages)
    made.check(messages, None, None, rendered)
    assert marked(rendered) == "<|user|>a<|end|>\n<|assistant|>⟦b<|end|>⟧\n"
    assert made.opened == {"<think>\n\n</think>\n\n"}


def test_what_the_model_must_write_before_its_answer_is_trained():
    """Inference gives <|assistant|>, and thinking that is off; <|say|> is for the model to write."""
    source = LOOP.replace("|>{{ m.content }}", "|>{{ '<|say|>' if m.role == 'assistant' }}{{ m.content }}")
    prompt = "{% if add_generation_prompt %}<|assistant|><|think|><|/think|>{% endif %}"
    rendered = Template(source + prompt).render(question("a", "b"))
    assert marked(rendered) == "<|user|>a<|end|>\n<|assistant|>⟦<|say|>b<|end|>⟧\n"
