"""Text and masks of conversations, by hand; what a template is given, and how it is compiled."""

from __future__ import annotations

from datetime import date
from pathlib import Path

from snaketron.data.chats import conversation
from snaketron.data.chats.environment import special_tokens
from snaketron.data.chats.mask import tokenize
from snaketron.data.chats.template import Template
from snaketron.log import UserError
from tests.unit.data.chats.chat_samples import build_tokenizer, question
from tests.unit.data.chats.golden import (
    BOTH,
    EACH_CASE,
    LOOP,
    PROMPT,
    assistant,
    call,
    compiled,
    marked,
    rendered,
    table,
    user,
)

import pytest


@BOTH
@EACH_CASE
def test_a_conversation_renders_to_this_text(name, case):
    assert marked(rendered(name, case)) == getattr(case, name)


def test_the_documentation_shows_what_is_tested():
    documentation = Path(__file__).parents[4] / "docs/conversations.md"
    assert f"```text\n{table()}```\n" in documentation.read_text()


@BOTH
@EACH_CASE
def test_the_trained_tokens_spell_the_trained_text(name, case):
    tokenizer, made = build_tokenizer(), rendered(name, case)
    input_ids, loss_mask = tokenize(tokenizer, made.text, made.spans)
    trained = tokenizer.decode(input_ids[loss_mask == 1].tolist(), skip_special_tokens=False)
    expected = "".join(part.split("⟧")[0] for part in getattr(case, name).split("⟦")[1:])
    assert bytes_of(trained) == expected.encode()


def bytes_of(decoded: str) -> bytes:
    """The bytes that byte-level tokens stand for (without a decoder the tokenizer joins them by spaces)."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    table = {char: byte for byte, char in bytes_to_unicode().items()}
    return bytes(table[char] for char in decoded.replace(" ", ""))


# ------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("shipped", {"enable_thinking": True}, "assistant\n<think>\n⟦Hm.\n</think>\n\n2<|im_end|>⟧"),
        ("shipped", {"low_effort": True}, "user\nTwo?\n\n{reasoning effort: low}<|im_end|>"),
        ("shipped", {"reasoning_budget": 7}, "user\nTwo?\n\n{thinking token budget: 7}<|im_end|>"),
        ("shipped", {"truncate_history_thinking": True}, "assistant\n⟦1<|im_end|>⟧"),
        ("shipped", {}, "assistant\n⟦<think>\nHmm.\n</think>\n\n1<|im_end|>⟧"),
        ("other", {"low_effort": True}, "user\nTwo? /low<|stop|>"),
        ("other", {"reasoning_budget": 7}, "user\nTwo? /budget 7<|stop|>"),
        ("other", {}, "assistant\n<think></think>⟦1<|stop|>⟧"),
        ("other", {"truncate_history_thinking": False}, "<think>\n⟦Hmm.\n</think>\n1<|stop|>⟧"),
    ],
)
def test_arguments_reach_the_template(name, arguments, expected):
    messages = [
        user("One?"),
        assistant("1", reasoning_content="Hmm."),
        user("Two?"),
        assistant("2", reasoning_content="Hm."),
    ]
    text = marked(compiled(name, **arguments).render(messages))
    assert text.count(expected) == 1 and text == marked(compiled(name).render(messages, None, arguments))


def test_arguments_are_also_given_as_one():
    """As `chat_template_kwargs`: the template of the Nemotron recipe reads them there."""
    source = "{{ chat_template_kwargs.mode }}{% generation %}{{ messages[0].content }}{% endgeneration %}"
    assert Template(source, arguments={"mode": "x"}).render([assistant("a")]).text == "xa"


@pytest.mark.parametrize("given", [{"city": "Oslo", "n": 1.0}, '{"city": "Oslo", "n": 1.0}'])
@pytest.mark.parametrize(
    ("wants", "expected"),
    [
        ("call.arguments | tojson", '{"city": "Oslo", "n": 1.0}'),
        (
            "call.arguments if call.arguments is string else call.arguments | tojson",
            '{"city": "Oslo", "n": 1.0}',
        ),
        ("call.arguments | items | map('join', '=') | join(',')", "city=Oslo,n=1.0"),
        ("'(' + call.arguments + ')'", '({"city": "Oslo", "n": 1.0})'),
        ("call.arguments", '{"city": "Oslo", "n": 1.0}'),
    ],
)
def test_arguments_of_calls_come_in_the_form_that_a_template_wants(given, wants, expected):
    source = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% for c in m.tool_calls %}"
        "{% set call = c.function %}{{ call.name }}{{ "
        + wants
        + " }}{% endfor %}{% endgeneration %}{% endfor %}"
    )
    function = call(given) | {"function": {"name": "f", "arguments": given}}
    found = conversation.conversation([user("a"), assistant(None, tool_calls=[function])])
    assert Template(source).render(found.messages).text == f"af{expected}"


def test_rendering_is_linear_in_the_number_of_turns(monkeypatch):
    """Each conversation is rendered once, whatever its length: no prefix is rendered again."""
    made = compiled("other")
    calls = []
    monkeypatch.setattr(made, "_write", lambda *a, write=made._write: calls.append(a) or write(*a))
    for turns in (1, 10, 100):
        _ = made.roles
        calls.clear()
        assert len(made.render(question("a", "b") * turns).spans) == turns
        assert len(calls) == 1


# ------------------------------------------------------------------------------------ compiling


def test_special_tokens_are_variables_of_the_template(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        '{"bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": null, "add_bos_token": true}'
    )
    variables = special_tokens(tmp_path)
    assert variables == {"bos_token": "<s>", "eos_token": "</s>"}
    source = "{{ bos_token }}{% generation %}{{ messages[0].content }}{{ eos_token }}{% endgeneration %}"
    assert marked(Template(source, variables=variables).render([assistant("a")])) == "<s>⟦a</s>⟧"


def test_a_template_that_does_not_parse_is_refused_with_its_line():
    with pytest.raises(UserError, match=r"my\.jinja:3: .*does not parse"):
        Template("a\nb\n{% if %}", name="my.jinja")
    with pytest.raises(UserError, match=r"my\.jinja:2: .*does not parse.*No filter named 'shout'"):
        Template("a\n{{ a | shout }}", name="my.jinja")
    with pytest.raises(UserError, match=r"my\.jinja:1: .*does not parse.*endgeneration"):
        Template("{% generation %}a", name="my.jinja")


def test_a_template_that_asks_for_the_date_is_told_the_configured_one():
    """Whatever the day: the same text, and so the same bytes."""
    source = "{{ strftime_now('%d %b %Y %H:%M') }}" + LOOP + PROMPT
    template = Template(source, day=date(2025, 2, 3))
    assert template.render(question("a", "b")).text.startswith("03 Feb 2025 00:00<|user|>a<|end|>")
    assert Template(source).render(question("a", "b")).text.startswith("01 Jan 2026 00:00<")


def test_other_names_that_transformers_gives_to_templates_are_there():
    source = (
        "{% set a = namespace(x=1) %}{% set b = dict(c='<é>') %}{% for m in messages %}{{ m.content }}<|end|>"
        "{% if loop.first %}{% continue %}{% endif %}{{ b | tojson }}{{ b | tojson(ensure_ascii=True) }}"
        "{{ [b, 1] | tojson(separators=(',', ':'), indent=1) }}{{ a.x }}<|end|>{% break %}{% endfor %}"
    )
    text = Template(source).render(question("a", "b")).text
    assert text == 'a<|end|>b<|end|>{"c": "<é>"}{"c": "<\\u00e9>"}[\n {\n  "c":"<é>"\n },\n 1\n]1<|end|>'
