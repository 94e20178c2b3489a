from __future__ import annotations

from typing import Any

from snaketron.data import chat
from snaketron.log import UserError
from tests.unit.data.chat_samples import TEMPLATE, build_tokenizer, question

import numpy as np
import pytest

SOURCE = TEMPLATE.read_text()
OURS = chat.compile_template(SOURCE)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"city": "string"}}}
TOOLS = """# Tools

You may call these functions:
<tools>
{"type": "function", "function": {"name": "weather", "parameters": {"city": "string"}}}
</tools>

A call is a JSON object with a name and arguments:
<tool_call>
{"name": "...", "arguments": {...}}
</tool_call>"""


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def tool(content: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content}


# Name, messages, tools, and the text; what lies between ⟦ and ⟧ is trained.
GOLDEN: list[tuple[str, list[dict[str, Any]], list[Any] | None, str]] = [
    (
        "question and answer",
        question("What is two?", "Two."),
        None,
        "<|im_start|>user\nWhat is two?<|im_end|>\n<|im_start|>assistant\n⟦Two.<|im_end|>⟧\n",
    ),
    (
        "several turns",
        [*question("One?", "1"), *question("Two?", "2")],
        None,
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n⟦1<|im_end|>⟧\n"
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n⟦2<|im_end|>⟧\n",
    ),
    (
        "system, and one in the middle",
        [
            {"role": "system", "content": "Be brief."},
            *question("One?", "1"),
            {"role": "developer", "content": "Be long."},
        ],
        None,
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
        "<|im_start|>assistant\n⟦1<|im_end|>⟧\n<|im_start|>system\nBe long.<|im_end|>\n",
    ),
    (
        "text is trimmed",
        question("  One?\n", "\n\n 1 \n"),
        None,
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n⟦1<|im_end|>⟧\n",
    ),
    (
        "tools with a system message",
        [{"role": "system", "content": "Be brief."}, *question("One?", "1")],
        [WEATHER],
        f"<|im_start|>system\nBe brief.\n\n{TOOLS}<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
        "<|im_start|>assistant\n⟦1<|im_end|>⟧\n",
    ),
    (
        "a tool call, its result and the answer",
        [
            user("Paris?"),
            assistant(None, tool_calls=[call({"city": "Paris"})]),
            tool("rain"),
            assistant("Wet."),
        ],
        [WEATHER],
        f"<|im_start|>system\n{TOOLS}<|im_end|>\n<|im_start|>user\nParis?<|im_end|>\n<|im_start|>assistant\n"
        '⟦<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>tool\n<tool_response>\nrain\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦Wet.<|im_end|>⟧\n",
    ),
    (
        "arguments as JSON text, and no arguments",
        [user("Paris?"), assistant("Let me look.", tool_calls=[call('{"city": "Paris"}'), call(None)])],
        None,
        "<|im_start|>user\nParis?<|im_end|>\n<|im_start|>assistant\n⟦Let me look.\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call><|im_end|>⟧\n',
    ),
    (
        "results that follow one another",
        [
            user("Both?"),
            assistant("", tool_calls=[call({}), call({})]),
            tool("rain"),
            tool("sun"),
            assistant("So."),
        ],
        None,
        "<|im_start|>user\nBoth?<|im_end|>\n<|im_start|>assistant\n"
        '⟦<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>tool\n<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦So.<|im_end|>⟧\n",
    ),
    (
        "reasoning",
        [user("Two?"), assistant("2", reasoning_content=" One and one. ")],
        None,
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\nOne and one.\n</think>\n\n2<|im_end|>⟧\n",
    ),
    (
        "reasoning under another name",
        [user("Two?"), assistant("2", reasoning="One and one.")],
        None,
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\nOne and one.\n</think>\n\n2<|im_end|>⟧\n",
    ),
    (
        "content as a list of parts",
        [user([{"type": "text", "text": "Tw"}, {"type": "text", "text": "o?"}]), assistant([{"text": "2"}])],
        None,
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n⟦2<|im_end|>⟧\n",
    ),
    (
        "not only ASCII",
        question("Größe: 東京 🙂?", "é🙂"),
        None,
        "<|im_start|>user\nGröße: 東京 🙂?<|im_end|>\n<|im_start|>assistant\n⟦é🙂<|im_end|>⟧\n",
    ),
]
CASES = pytest.mark.parametrize(
    ("messages", "tools", "text"), [c[1:] for c in GOLDEN], ids=[c[0] for c in GOLDEN]
)


def marked(text: str, spans: list[chat.Span]) -> str:
    for start, end in reversed(spans):
        text = f"{text[:start]}⟦{text[start:end]}⟧{text[end:]}"
    return text


@CASES
def test_a_conversation_renders_to_this_text(messages, tools, text):
    checked = chat.conversation(messages, tools)
    assert marked(*chat.render(OURS, checked.messages, checked.tools)) == text


@pytest.fixture(scope="module")
def hugging_face():
    from transformers import PreTrainedTokenizerFast

    return {
        trim: PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(trim), chat_template=SOURCE)
        for trim in (False, True)
    }


@pytest.mark.parametrize("trim_offsets", [False, True])
@CASES
def test_ids_and_mask_are_those_of_transformers(hugging_face, trim_offsets, messages, tools, text):
    theirs = hugging_face[trim_offsets].apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    input_ids, loss_mask = chat.tokenize(build_tokenizer(trim_offsets), *chat.render(OURS, messages, tools))
    assert input_ids.dtype == np.int32 and loss_mask.dtype == np.uint8
    assert input_ids.tolist() == theirs["input_ids"]
    assert loss_mask.tolist() == theirs["assistant_masks"]


@CASES
def test_the_trained_tokens_spell_the_trained_text(messages, tools, text):
    tokenizer = build_tokenizer()
    input_ids, loss_mask = chat.tokenize(tokenizer, *chat.render(OURS, messages, tools))
    trained = tokenizer.decode(input_ids[loss_mask == 1].tolist(), skip_special_tokens=False)
    assert bytes_of(trained) == "".join(part.split("⟧")[0] for part in text.split("⟦")[1:]).encode()


def bytes_of(decoded: str) -> bytes:
    """The bytes that byte-level tokens stand for (without a decoder the tokenizer joins them by spaces)."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    table = {char: byte for byte, char in bytes_to_unicode().items()}
    return bytes(table[char] for char in decoded.replace(" ", ""))


def test_the_prompt_for_an_answer_is_the_start_of_the_training_text(hugging_face):
    """At inference the model continues from exactly the ids that it was trained to continue."""
    messages = question("What is two?", "Two.")
    prompt = hugging_face[False].apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    input_ids, loss_mask = chat.tokenize(build_tokenizer(), *chat.render(OURS, messages))
    assert input_ids[: len(prompt)].tolist() == prompt
    assert loss_mask.argmax() == len(prompt)


def test_a_token_that_reaches_over_the_border_is_not_trained():
    tokenizer = build_tokenizer()
    text = "The capital"
    assert tokenizer.encode(text).tokens[-1] == "Ġcapital"
    assert chat.tokenize(tokenizer, text, [(4, 11)])[1].sum() == 0  # the space lies outside
    assert chat.tokenize(tokenizer, text, [(3, 11)])[1].sum() == 1


def test_spaces_before_an_answer_are_not_trained_where_offsets_leave_spaces_out():
    tokenizer = build_tokenizer(trim_offsets=True)
    text = "is  <|im_end|>"
    spaces = [
        o
        for o, t in zip(tokenizer.encode(text).offsets, tokenizer.encode(text).tokens, strict=True)
        if "Ġ" in t
    ]
    assert spaces and all(start == end for start, end in spaces)
    assert chat.tokenize(tokenizer, text, [(4, 14)])[1].tolist() == [0] * len(spaces) + [0, 1]


def test_spans_are_right_when_the_block_lies_in_a_macro():
    template = chat.compile_template(
        "{% macro say(m) %}A: {% generation %}{{ m.content }}{% endgeneration %}!{% endmacro %}"
        "{% for m in messages %}{{ say(m) }}{% endfor %}"
    )
    assert marked(*chat.render(template, [assistant("one"), assistant("two")])) == "A: ⟦one⟧!A: ⟦two⟧!"


def test_special_tokens_are_variables_of_the_template(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(
        '{"bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": null, "add_bos_token": true}'
    )
    variables = chat.special_tokens(tmp_path)
    assert variables == {"bos_token": "<s>", "eos_token": "</s>"}
    source = "{{ bos_token }}{% generation %}{{ messages[0].content }}{{ eos_token }}{% endgeneration %}"
    template = chat.compile_template(source, variables=variables)
    assert marked(*chat.render(template, [assistant("a")])) == "<s>⟦a</s>⟧"


def test_a_template_without_a_generation_block_is_refused():
    with pytest.raises(UserError, match=r"my\.jinja: .*between \{% generation %\}"):
        chat.compile_template("{{ messages[0].content }}", name="my.jinja")


def test_a_template_that_does_not_parse_is_refused_with_its_line():
    with pytest.raises(UserError, match=r"my\.jinja:3: .*does not parse"):
        chat.compile_template("a\nb\n{% if %}", name="my.jinja")
    with pytest.raises(UserError, match=r"my\.jinja:1: .*does not parse.*endgeneration"):
        chat.compile_template("{% generation %}a", name="my.jinja")


def test_a_template_cannot_ask_for_the_date():
    template = chat.compile_template("{{ strftime_now('%Y') }}{% generation %}{% endgeneration %}")
    with pytest.raises(chat.Unusable, match="strftime_now"):
        chat.render(template, question("a", "b"))


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
    with pytest.raises(chat.Unusable) as caught:
        chat.conversation(messages, tools)
    assert caught.value.reason == reason


def test_messages_and_tools_may_be_json_text():
    checked = chat.conversation('[{"role": "assistant", "content": "b"}]', '[{"type": "function"}]')
    assert checked == chat.Conversation([assistant("b")], [{"type": "function"}])
    assert chat.conversation(question("a", "b"), "[]").tools is None


@pytest.mark.parametrize("place", ["messages", "tools"])
def test_text_that_holds_a_control_token_is_unusable(place):
    pattern = chat.control_tokens(build_tokenizer())
    assert pattern is not None
    ok = chat.Conversation(question("<think>", "b"), [WEATHER])  # not one that steers
    chat.check_control_tokens(ok, pattern)
    bad = (
        chat.Conversation(question("a<|im_end|>", "b"), None)
        if place == "messages"
        else chat.Conversation(question("a", "b"), [{"name": "<|im_start|>"}])
    )
    with pytest.raises(chat.Unusable, match="control token"):
        chat.check_control_tokens(bad, pattern)


@pytest.mark.parametrize("text", ["\ufdd0", "\ufdd1x\ufdd0", "\ud800"])
def test_text_that_is_no_unicode_text_is_unusable(text):
    with pytest.raises(chat.Unusable):
        chat.render(OURS, question("a", text))
