"""Sample conversations: what the standard library's docstrings say, asked and answered.

They have OpenAI's message format. A generator that is seeded with the name asked about varies the wording, so
every run makes the same conversations.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from snaketron.data.sample.text import Documented, Row, documented, standard_library

Message = dict[str, Any]

CONVERSATIONS = 2000  # of a source
ANSWER = 320  # characters of an answer at most
SIGNATURE = 100  # characters of a signature at most

SYSTEMS = (
    "You are a helpful assistant.",
    "You answer questions about Python's standard library in one or two sentences.",
    "You are a patient Python tutor. Be brief.",
    "Answer from the documentation only.",
)
WHAT = (
    "What does `{name}` do?",
    "Explain `{name}`.",
    "What is `{name}` for?",
    "I came across `{name}`. What is it?",
    "Tell me about {name} in Python.",
    "Describe {name} briefly.",
)
SIGNATURES = (
    "What is the signature of `{name}`?",
    "How do I call `{name}`?",
    "What are the parameters of `{name}`?",
    "Which arguments does {name} take?",
)
FOLLOW_UPS = (
    "And how do I call it?",
    "What arguments does it take?",
    "Show me its signature.",
    "How is it called?",
)
MODULES = ("Which module has `{short}`: {a} or {b}?", "Do I import `{short}` from {a} or from {b}?")
THANKS = ("Thanks!", "Thank you, that helps.", "Great, thanks.")
WELCOME = ("You're welcome.", "Happy to help.", "Any time.")

TOOL = {
    "type": "function",
    "function": {
        "name": "lookup_docs",
        "description": "Look up a Python name.",
        "parameters": {
            "type": "object",
            "properties": {"name": {"type": "string"}},
            "required": ["name"],
        },
    },
}


def questions() -> Iterator[Row]:
    """Questions and answers: single and several turns, with and without a system message."""
    entries = _entries()
    modules = sorted({_module(entry) for entry in entries})
    for i, entry in enumerate(entries[:CONVERSATIONS]):
        rng = random.Random(f"questions {entry.name}")
        turns = _question(entry, rng, modules)
        if i % 4 == 0:
            turns = [_message("system", rng.choice(SYSTEMS)), *turns]
        yield {"id": f"questions/{entry.name}", "messages": turns}


def tools() -> Iterator[Row]:
    """Answers that the assistant looks up with a tool; arguments as an object or as a JSON string."""
    for i, entry in enumerate(_entries()[-CONVERSATIONS:]):
        rng = random.Random(f"tools {entry.name}")
        yield {"id": f"tools/{entry.name}", "messages": _lookup(entry, rng, i), "tools": [TOOL]}


SOURCES: dict[str, Callable[[], Iterator[Row]]] = {"questions": questions, "tools": tools}


@functools.cache
def _entries() -> list[Documented]:
    """Functions and classes with a short description and signature, in an order without pattern."""
    entries = {}
    for module, path in standard_library():
        if any(part.startswith("_") for part in module.split(".")):
            continue
        for entry in documented(module, path):
            description = _first_paragraph(entry.doc)
            if entry.name != module and len(description) <= ANSWER and len(entry.signature) <= SIGNATURE:
                entries[entry.name] = entry._replace(doc=description)
    return sorted(entries.values(), key=lambda entry: random.Random(entry.name).random())


def _first_paragraph(doc: str) -> str:
    return " ".join(doc.partition("\n\n")[0].split())


def _question(entry: Documented, rng: random.Random, modules: list[str]) -> list[Message]:
    kind = rng.choice(("what", "what", "signature", "both", "both", "module"))
    what = [_message("user", rng.choice(WHAT).format(name=entry.name)), _message("assistant", entry.doc)]
    if kind == "signature" and entry.signature:
        asked = rng.choice(SIGNATURES).format(name=entry.name)
        return [_message("user", asked), _message("assistant", f"`{entry.name}{entry.signature}`")]
    if kind == "both" and entry.signature:
        answer = f"Like this: `{entry.name}{entry.signature}`"
        return [*what, _message("user", rng.choice(FOLLOW_UPS)), _message("assistant", answer)]
    if kind == "module":
        module, other = _module(entry), rng.choice(modules)
        if not other.startswith(module) and not module.startswith(other):
            a, b = rng.sample((module, other), 2)
            asked = rng.choice(MODULES).format(short=entry.name.removeprefix(f"{module}."), a=a, b=b)
            return [_message("user", asked), _message("assistant", f"It is in {module}: `{entry.name}`.")]
    return what


def _lookup(entry: Documented, rng: random.Random, i: int) -> list[Message]:
    arguments: Any = {"name": entry.name}
    if i % 2:
        arguments = json.dumps(arguments)
    call = _message("assistant", rng.choice(("", "", "Let me look that up.")))
    call["tool_calls"] = [
        {"id": "call_1", "type": "function", "function": {"name": "lookup_docs", "arguments": arguments}}
    ]
    found = rng.random() > 0.05
    asked_again = i % 6 == 0 and found and entry.signature != ""
    result = {"doc": entry.doc} if found else {"error": "not found"}
    if asked_again:
        result["signature"] = entry.signature
    answer = _message(
        "assistant", entry.doc if found else f"The documentation has no entry for `{entry.name}`."
    )
    if i % 5 == 0:
        call["reasoning_content"] = "The documentation has it; I look it up rather than guess."
    if i % 10 == 0:
        answer["reasoning_content"] = (
            "The result says what to answer." if found else "There is no such entry."
        )
    messages = [
        _message("user", rng.choice(WHAT).format(name=entry.name)),
        call,
        {"role": "tool", "tool_call_id": "call_1", "name": "lookup_docs", "content": json.dumps(result)},
        answer,
    ]
    if asked_again:
        messages += [
            _message("user", rng.choice(FOLLOW_UPS)),
            _message("assistant", f"`{entry.name}{entry.signature}`"),
        ]
    elif i % 6 == 1:
        messages += [_message("user", rng.choice(THANKS)), _message("assistant", rng.choice(WELCOME))]
    if i % 8 == 0:
        messages.insert(0, _message("system", rng.choice(SYSTEMS)))
    return messages


def _module(entry: Documented) -> str:
    return entry.name.rsplit(".", 2 if _is_method(entry) else 1)[0]


def _is_method(entry: Documented) -> bool:
    parts = entry.name.split(".")
    return len(parts) > 2 and entry.signature.startswith(("(self", "(cls"))


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
