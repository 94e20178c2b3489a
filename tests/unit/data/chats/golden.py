"""What conversations become, worked out by hand: for each shape of a message, the text by two templates.

What lies between ⟦ and ⟧ is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snaketron.data.chats import conversation
from snaketron.data.chats.marks import Rendered
from snaketron.data.chats.template import Template
from tests.unit.data.chats.chat_samples import TEMPLATE, question

import pytest

SOURCES = {
    "shipped": TEMPLATE.read_text(),
    "other": (Path(__file__).parent / "other_template.jinja").read_text(),
}
OFF = {"enable_thinking": False}


def compiled(name: str, **arguments: Any) -> Template:
    return Template(
        SOURCES[name],
        name=name,
        variables={"bos_token": "<|endoftext|>"},
        arguments=arguments,
        off_arguments=OFF,
    )


def marked(rendered: Rendered) -> str:
    """A text with what is trained between ⟦ and ⟧."""
    text = rendered.text
    for start, end in reversed(rendered.spans):
        text = f"{text[:start]}⟦{text[start:end]}⟧{text[end:]}"
    return text


def call(arguments: Any) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def tool(content: Any) -> dict[str, Any]:
    return {"role": "tool", "content": content}


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
FUNCTIONS = (
    'Functions: [{"type": "function", "function": {"name": "weather", "parameters": {"city": "string"}}}]'
)
SYSTEM = "<|endoftext|><|turn|>system\nBe helpful.<|stop|>\n\n"


@dataclass(frozen=True)
class Case:
    name: str
    messages: list[dict[str, Any]]
    shipped: str
    other: str
    tools: list[Any] | None = None


CASES = [
    Case(
        "question and answer",
        question("What is two?", "Two."),
        "<|im_start|>user\nWhat is two?<|im_end|>\n<|im_start|>assistant\n⟦Two.<|im_end|>⟧\n",
        f"{SYSTEM}<|turn|>user\nWhat is two?<|stop|>\n\n<|turn|>assistant\n<think></think>⟦Two.<|stop|>⟧\n\n",
    ),
    Case(
        "several turns",
        [*question("One?", "1"), *question("Two?", "2")],
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n⟦1<|im_end|>⟧\n"
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n⟦2<|im_end|>⟧\n",
        f"{SYSTEM}<|turn|>user\nOne?<|stop|>\n\n<|turn|>assistant\n<think></think>⟦1<|stop|>⟧\n\n"
        "<|turn|>user\nTwo?<|stop|>\n\n<|turn|>assistant\n<think></think>⟦2<|stop|>⟧\n\n",
    ),
    Case(
        "system, and a developer at the end",
        [
            {"role": "system", "content": "Be brief."},
            *question("One?", "1"),
            {"role": "developer", "content": "Be long."},
        ],
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
        "<|im_start|>assistant\n⟦1<|im_end|>⟧\n<|im_start|>system\nBe long.<|im_end|>\n",
        "<|endoftext|><|turn|>system\nBe brief.<|stop|>\n\n<|turn|>user\nOne?<|stop|>\n\n"
        "<|turn|>assistant\n<think></think>⟦1<|stop|>⟧\n\n<|turn|>system\nBe long.<|stop|>\n\n",
    ),
    Case(
        "developer first",
        [{"role": "developer", "content": "Be brief."}, *question("One?", "1")],
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
        "<|im_start|>assistant\n⟦1<|im_end|>⟧\n",
        "<|endoftext|><|turn|>system\nBe brief.<|stop|>\n\n<|turn|>user\nOne?<|stop|>\n\n"
        "<|turn|>assistant\n<think></think>⟦1<|stop|>⟧\n\n",
    ),
    Case(
        "consecutive turns of one role",
        [user("One?"), user("Quick!"), assistant("1"), assistant("And 2.")],
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>user\nQuick!<|im_end|>\n"
        "<|im_start|>assistant\n⟦1<|im_end|>⟧\n<|im_start|>assistant\n⟦And 2.<|im_end|>⟧\n",
        f"{SYSTEM}<|turn|>user\nOne?<|stop|>\n\n<|turn|>user\nQuick!<|stop|>\n\n"
        "<|turn|>assistant\n<think></think>⟦1<|stop|>⟧\n\n"
        "<|turn|>assistant\n<think></think>⟦And 2.<|stop|>⟧\n\n",
    ),
    Case(
        "the assistant begins",
        [assistant("Hi."), *question("One?", "1")],
        "<|im_start|>assistant\n⟦Hi.<|im_end|>⟧\n<|im_start|>user\nOne?<|im_end|>\n"
        "<|im_start|>assistant\n⟦1<|im_end|>⟧\n",
        f"{SYSTEM}<|turn|>assistant\n<think></think>⟦Hi.<|stop|>⟧\n\n<|turn|>user\nOne?<|stop|>\n\n"
        "<|turn|>assistant\n<think></think>⟦1<|stop|>⟧\n\n",
    ),
    Case(
        "space around an answer",
        question("One?", "\n\n 1 \n"),
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n⟦1<|im_end|>⟧\n",
        f"{SYSTEM}<|turn|>user\nOne?<|stop|>\n\n<|turn|>assistant\n<think></think>⟦1<|stop|>⟧\n\n",
    ),
    Case(
        "tools with a system message",
        [{"role": "system", "content": "Be brief."}, *question("One?", "1")],
        f"<|im_start|>system\nBe brief.\n\n{TOOLS}<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
        "<|im_start|>assistant\n⟦1<|im_end|>⟧\n",
        f"<|endoftext|><|turn|>system\nBe brief.\n\n{FUNCTIONS}<|stop|>\n\n<|turn|>user\nOne?<|stop|>\n\n"
        "<|turn|>assistant\n<think></think>⟦1<|stop|>⟧\n\n",
        [WEATHER],
    ),
    Case(
        "a tool call, its result and the answer",
        [
            user("Paris?"),
            assistant(None, tool_calls=[call({"city": "Paris"})]),
            tool("rain"),
            assistant("Wet."),
        ],
        f"<|im_start|>system\n{TOOLS}<|im_end|>\n<|im_start|>user\nParis?<|im_end|>\n<|im_start|>assistant\n"
        '⟦<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>tool\n<tool_response>\nrain\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦Wet.<|im_end|>⟧\n",
        f"<|endoftext|><|turn|>system\nBe helpful.\n\n{FUNCTIONS}<|stop|>\n\n<|turn|>user\nParis?<|stop|>\n\n"
        '<|turn|>assistant\n<think></think>⟦<call name="weather">\ncity: Paris\n</call><|stop|>⟧\n\n'
        "<|turn|>user\n[result] rain\n<|stop|>\n\n"
        "<|turn|>assistant\n<think></think>⟦Wet.<|stop|>⟧\n\n",
        [WEATHER],
    ),
    Case(
        "arguments as JSON text, and no arguments",
        [user("Paris?"), assistant("Let me look.", tool_calls=[call('{"city": "Paris"}'), call(None)])],
        "<|im_start|>user\nParis?<|im_end|>\n<|im_start|>assistant\n⟦Let me look.\n"
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call><|im_end|>⟧\n',
        f"{SYSTEM}<|turn|>user\nParis?<|stop|>\n\n<|turn|>assistant\n<think></think>⟦Let me look."
        '<call name="weather">\ncity: Paris\n</call><call name="weather">\n</call><|stop|>⟧\n\n',
    ),
    Case(
        "results that follow one another",
        [
            user("Both?"),
            assistant("", tool_calls=[call({"n": 1}), call({"n": [2, "é"]})]),
            tool("rain"),
            tool("sun"),
            assistant("So."),
        ],
        "<|im_start|>user\nBoth?<|im_end|>\n<|im_start|>assistant\n"
        '⟦<tool_call>\n{"name": "weather", "arguments": {"n": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"n": [2, "é"]}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>tool\n<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun\n</tool_response>"
        "<|im_end|>\n<|im_start|>assistant\n⟦So.<|im_end|>⟧\n",
        f"{SYSTEM}<|turn|>user\nBoth?<|stop|>\n\n<|turn|>assistant\n<think></think>"
        '⟦<call name="weather">\nn: 1\n</call><call name="weather">\nn: [2, "é"]\n</call><|stop|>⟧\n\n'
        "<|turn|>user\n[result] rain\n[result] sun\n<|stop|>\n\n"
        "<|turn|>assistant\n<think></think>⟦So.<|stop|>⟧\n\n",
    ),
    Case(
        "reasoning",
        [user("Two?"), assistant("2", reasoning_content="One and one.")],
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\nOne and one.\n</think>\n\n2<|im_end|>⟧\n",
        f"{SYSTEM}<|turn|>user\nTwo?<|stop|>\n\n"
        "<|turn|>assistant\n<think>\n⟦One and one.\n</think>\n2<|stop|>⟧\n\n",
    ),
    Case(
        "reasoning under another name",
        [user("Two?"), assistant("2", reasoning="One and one.", reasoning_content=None)],
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n"
        "⟦<think>\nOne and one.\n</think>\n\n2<|im_end|>⟧\n",
        f"{SYSTEM}<|turn|>user\nTwo?<|stop|>\n\n"
        "<|turn|>assistant\n<think>\n⟦One and one.\n</think>\n2<|stop|>⟧\n\n",
    ),
    Case(
        "reasoning in two turns, the first a call",
        [
            user("Paris?"),
            assistant("", reasoning_content="I look.", tool_calls=[call({})]),
            tool("rain"),
            assistant("Wet.", reasoning_content="Rain is wet."),
            user("Sure?"),
            assistant("Yes.", reasoning_content="It is."),
        ],
        "<|im_start|>user\nParis?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nI look.\n</think>\n\n"
        '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call><|im_end|>⟧\n'
        "<|im_start|>tool\n<tool_response>\nrain\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nRain is wet.\n</think>\n\nWet.<|im_end|>⟧\n"
        "<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nIt is.\n</think>\n\nYes.<|im_end|>⟧\n",
        f"{SYSTEM}<|turn|>user\nParis?<|stop|>\n\n"
        '<|turn|>assistant\n<think></think>⟦<call name="weather">\n</call><|stop|>⟧\n\n'
        "<|turn|>user\n[result] rain\n<|stop|>\n\n<|turn|>assistant\n<think></think>⟦Wet.<|stop|>⟧\n\n"
        "<|turn|>user\nSure?<|stop|>\n\n<|turn|>assistant\n<think>\n⟦It is.\n</think>\nYes.<|stop|>⟧\n\n",
    ),
    Case(
        "content as a list of parts",
        [user([{"type": "text", "text": "Tw"}, {"type": "text", "text": "o?"}]), assistant([{"text": "2"}])],
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n⟦2<|im_end|>⟧\n",
        f"{SYSTEM}<|turn|>user\nTwo?<|stop|>\n\n<|turn|>assistant\n<think></think>⟦2<|stop|>⟧\n\n",
    ),
    Case(
        "not only ASCII",
        question("Größe: 東京 🙂?", "é🙂"),
        "<|im_start|>user\nGröße: 東京 🙂?<|im_end|>\n<|im_start|>assistant\n⟦é🙂<|im_end|>⟧\n",
        f"{SYSTEM}<|turn|>user\nGröße: 東京 🙂?<|stop|>\n\n"
        "<|turn|>assistant\n<think></think>⟦é🙂<|stop|>⟧\n\n",
    ),
]


SHOWN = (
    "question and answer",
    "consecutive turns of one role",
    "arguments as JSON text, and no arguments",
    "results that follow one another",
    "reasoning in two turns, the first a call",
)


def table() -> str:
    """Some of the cases for the documentation: what is said, and the text by the shipped template."""
    shown = [case for case in CASES if case.name in SHOWN]
    lines = []
    for case in shown:
        lines += [f"{case.name}: {'; '.join(map(_said, case.messages))}", *_lines(case.shipped)]
    found = conversation.conversation(shown[-1].messages)
    template = compiled("shipped", truncate_history_thinking=True)
    for turn, first, end in found.turns:
        made = template.render(found.messages[:end])
        spans = [span for span, owner in zip(made.spans, made.owners, strict=True) if (owner or 0) >= first]
        lines += [f"reasoning in two turns, turn {turn}, with truncate_history_thinking"]
        lines += _lines(marked(Rendered(made.text, spans, [])))
    return "\n".join(lines) + "\n"


def _lines(text: str) -> list[str]:
    parts = text.replace("\n", "⏎").split("<|im_start|>")
    return [f"    <|im_start|>{part}" for part in parts if part]


def _said(message: dict[str, Any]) -> str:
    parts = [f"thinks {message['reasoning_content']!r}"] if message.get("reasoning_content") else []
    parts += [repr(message["content"])] if message["content"] else []
    calls = message.get("tool_calls", [])
    parts += [f"calls {c['function']['name']}({c['function']['arguments'] or ''})" for c in calls]
    return f"{message['role']} {', '.join(parts)}"


EACH_CASE = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
BOTH = pytest.mark.parametrize("name", ["shipped", "other"])


def rendered(name: str, case: Case, **arguments: Any) -> Rendered:
    found = conversation.conversation(case.messages, case.tools)
    return compiled(name, **arguments).render(found.messages, found.tools)


# ------------------------------------------------------------ a template without generation blocks

LOOP = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
