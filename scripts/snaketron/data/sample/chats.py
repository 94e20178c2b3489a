"""Sample conversations: what the standard library's docstrings say, asked and answered.

They have OpenAI's message format. A generator that is seeded with the name asked about varies the wording, so
every run makes the same conversations. The source `tools` is in `requests.py`.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator

from snaketron.data.sample.requests import Message, conversations, message
from snaketron.data.sample.text import Documented, Row, documented, standard_library

CONVERSATIONS = 2000
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


def questions() -> Iterator[Row]:
    """Questions and answers: single and several turns, with and without a system message."""
    entries = _entries()
    modules = sorted({_module(entry) for entry in entries})
    for i, entry in enumerate(entries[:CONVERSATIONS]):
        rng = random.Random(f"questions {entry.name}")
        turns = _question(entry, rng, modules)
        if i % 4 == 0:
            turns = [message("system", rng.choice(SYSTEMS)), *turns]
        yield {"id": f"questions/{entry.name}", "messages": turns}


SOURCES: dict[str, Callable[[], Iterator[Row]]] = {"questions": questions, "tools": conversations}


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
    what = [message("user", rng.choice(WHAT).format(name=entry.name)), message("assistant", entry.doc)]
    if kind == "signature" and entry.signature:
        asked = rng.choice(SIGNATURES).format(name=entry.name)
        return [message("user", asked), message("assistant", f"`{entry.name}{entry.signature}`")]
    if kind == "both" and entry.signature:
        answer = f"Like this: `{entry.name}{entry.signature}`"
        return [*what, message("user", rng.choice(FOLLOW_UPS)), message("assistant", answer)]
    if kind == "module":
        module, other = _module(entry), rng.choice(modules)
        if not other.startswith(module) and not module.startswith(other):
            a, b = rng.sample((module, other), 2)
            asked = rng.choice(MODULES).format(short=entry.name.removeprefix(f"{module}."), a=a, b=b)
            return [message("user", asked), message("assistant", f"It is in {module}: `{entry.name}`.")]
    return what


def _module(entry: Documented) -> str:
    return entry.name.rsplit(".", 2 if _is_method(entry) else 1)[0]


def _is_method(entry: Documented) -> bool:
    parts = entry.name.split(".")
    return len(parts) > 2 and entry.signature.startswith(("(self", "(cls"))
