"""Text and masks of conversations, by hand and against transformers and prefix re-rendering."""

from __future__ import annotations

import random
from datetime import date
from pathlib import Path
from typing import Any

from snaketron.data.chats import conversation, unusable
from snaketron.data.chats.environment import special_tokens
from snaketron.data.chats.mask import tokenize
from snaketron.data.chats.template import Template
from snaketron.log import UserError
from tests.unit.data.chats.chat_samples import build_tokenizer, question
from tests.unit.data.chats.golden import (
    CASES,
    LOOP,
    OFF,
    PROMPT,
    SOURCES,
    WEATHER,
    Case,
    assistant,
    call,
    compiled,
    marked,
    table,
    tool,
    user,
)

import numpy as np
import pytest

EACH_CASE = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
BOTH = pytest.mark.parametrize("name", ["shipped", "other"])


def rendered(name: str, case: Case, **arguments: Any):
    found = conversation.conversation(case.messages, case.tools)
    return compiled(name, **arguments).render(found.messages, found.tools)


@BOTH
@EACH_CASE
def test_a_conversation_renders_to_this_text(name, case):
    assert marked(rendered(name, case)) == getattr(case, name)


def test_the_documentation_shows_what_is_tested():
    documentation = Path(__file__).parents[4] / "docs/conversations.md"
    assert f"```text\n{table()}```\n" in documentation.read_text()


# --------------------------------------------------------------------------- independent implementations


@pytest.fixture(scope="module")
def hugging_face():
    from transformers import PreTrainedTokenizerFast

    return {
        (name, trim): PreTrainedTokenizerFast(
            tokenizer_object=build_tokenizer(trim), chat_template=source, bos_token="<|endoftext|>"
        )
        for name, source in SOURCES.items()
        for trim in (False, True)
    }


@pytest.mark.parametrize("trim_offsets", [False, True])
@EACH_CASE
def test_ids_and_mask_are_those_of_transformers(hugging_face, trim_offsets, case):
    theirs = hugging_face["shipped", trim_offsets].apply_chat_template(
        case.messages,
        tools=case.tools,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    made = rendered("shipped", case)
    input_ids, loss_mask = tokenize(build_tokenizer(trim_offsets), made.text, made.spans)
    assert input_ids.dtype == np.int32 and loss_mask.dtype == np.uint8
    assert input_ids.tolist() == theirs["input_ids"]
    assert loss_mask.tolist() == theirs["assistant_masks"]


def by_prefixes(tokenizer: Any, case: Case, **arguments: Any) -> list[tuple[int, int]]:
    """Spans from rendering each prefix with transformers.

    An answer begins where its prompt ends, and ends with the prefix that has it, but for white space. Answers
    before the last message of the user are left out where the history is shortened.
    """
    found = conversation.conversation(case.messages, case.tools)
    messages = [m | {"role": "system"} if m["role"] == "developer" else m for m in found.messages]
    shortened = arguments.get("truncate_history_thinking", True)
    after = max(i for i, m in enumerate(messages) if m["role"] == "user") if shortened else -1

    def text(upto: int, thinks: bool, prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            messages[:upto],
            tools=found.tools,
            tokenize=False,
            add_generation_prompt=prompt,
            **{"enable_thinking": thinks} | arguments,
        )

    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i > after:
            thinks = "reasoning_content" in message
            prompt, whole = text(i, thinks, True) if i else None, text(i + 1, thinks, False)
            if prompt is not None:
                assert whole.startswith(prompt)
                spans.append((len(prompt), len(whole.rstrip())))
    return spans


@pytest.mark.parametrize("shortened", [True, False])
@EACH_CASE
def test_spans_without_generation_blocks_are_those_of_prefix_rendering(hugging_face, case, shortened):
    tokenizer = hugging_face["other", False]
    made = rendered("other", case, truncate_history_thinking=shortened)
    expected = by_prefixes(tokenizer, case, truncate_history_thinking=shortened)
    first = {"the assistant begins": 1}.get(case.name, 0)  # nothing is asked before it
    assert expected and made.spans[-len(expected) :] == expected
    if not shortened:
        assert len(made.spans) == len(expected) + first


@EACH_CASE
def test_the_text_without_generation_blocks_is_that_of_transformers(hugging_face, case):
    found = conversation.conversation(case.messages, case.tools)
    messages = [m | {"role": "system"} if m["role"] == "developer" else m for m in found.messages]
    theirs = hugging_face["other", False].apply_chat_template(messages, tools=found.tools)["input_ids"]
    made = rendered("other", case)
    assert tokenize(build_tokenizer(), made.text, made.spans)[0].tolist() == theirs


def random_case(number: int) -> Case:
    """Turns of any kind one after the other: repeated roles, reasoning here and there, calls and results."""
    draw = random.Random(number)
    words = ["Paris", "two plus two", "é 東京", "  spaced ", "{'a': 1}", "a\nb", "<think>", "end."]
    messages = [{"role": "system", "content": "Be brief."}] if draw.random() < 0.3 else []
    for _ in range(draw.randint(1, 5)):
        messages += [user(draw.choice(words)) for _ in range(draw.choice((1, 1, 1, 2)))]
        for _ in range(draw.choice((0, 0, 1, 2))):
            arguments = draw.choice(({}, {"city": draw.choice(words)}, '{"n": [1, 2.5, null]}'))
            calls = [call(arguments) for _ in range(draw.randint(1, 2))]
            messages.append(assistant(draw.choice(("", *words)), tool_calls=calls))
            messages += [tool(draw.choice(words)) for _ in calls]
        messages.append(assistant(draw.choice(words)))
        for message in messages:
            if message["role"] == "assistant" and "reasoning_content" not in message and draw.random() < 0.4:
                message["reasoning_content"] = draw.choice(words)
    return Case(f"random {number}", messages, "", "", [WEATHER] if draw.random() < 0.5 else None)


@pytest.mark.parametrize("shortened", [True, False])
def test_random_conversations_have_the_spans_of_prefix_rendering(hugging_face, shortened):
    tokenizer = hugging_face["other", False]
    template = compiled("other", truncate_history_thinking=shortened)
    for number in range(150):
        case = random_case(number)
        found = conversation.conversation(case.messages, case.tools)
        made = template.render(found.messages, found.tools)
        expected = by_prefixes(tokenizer, case, truncate_history_thinking=shortened)
        assert made.spans[-len(expected) :] == expected
        assert shortened or len(made.spans) == len(expected)
        template.check(found.messages, found.tools, None, made)


def test_random_conversations_have_the_ids_and_masks_of_transformers(hugging_face):
    template, tokenizer = compiled("shipped"), build_tokenizer()
    for number in range(150):
        case = random_case(number)
        found = conversation.conversation(case.messages, case.tools)
        theirs = hugging_face["shipped", False].apply_chat_template(
            found.messages,
            tools=found.tools,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        made = template.render(found.messages, found.tools)
        input_ids, loss_mask = tokenize(tokenizer, made.text, made.spans)
        assert input_ids.tolist() == theirs["input_ids"]
        assert loss_mask.tolist() == theirs["assistant_masks"]


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


@BOTH
@pytest.mark.parametrize("thinks", [False, True])
def test_the_prompt_for_an_answer_is_the_start_of_the_training_text(hugging_face, name, thinks):
    """At inference the model continues from exactly the ids that it was trained to continue."""
    messages = [user("What is two?"), assistant("Two.", **({"reasoning_content": "Hm."} if thinks else {}))]
    prompt = hugging_face[name, False].apply_chat_template(
        messages[:1], add_generation_prompt=True, enable_thinking=thinks
    )["input_ids"]
    made = compiled(name).render(messages, None, {"enable_thinking": thinks})
    input_ids, loss_mask = tokenize(build_tokenizer(), made.text, made.spans)
    assert input_ids[: len(prompt)].tolist() == prompt
    assert loss_mask.argmax() == len(prompt)


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


# --------------------------------------------------------------------------- templates that mark nothing


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


# ----------------------------------------------------------------- what must not be trained, or left out

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
