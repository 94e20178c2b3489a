"""Sample requests: what a user wants, the call of a tool that does it, its result and the answer.

The corpus `requests` has them as text, and the source `tools` as conversations. No two of all these requests
have the same arguments. So a held-out one can only be answered by taking the arguments from what the user
says; a model that learned the others by heart gets it wrong.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

Message = dict[str, Any]
Row = dict[str, Any]

TOOLS: list[dict[str, Any]] = json.loads(Path(__file__).with_name("tools.json").read_text(encoding="utf-8"))

IN_TEXT = 200  # requests of each tool that are in the corpus, in every wording
CONVERSATIONS = 2000
LONGER = 24  # one conversation in so many has more than a request with its call, result and answer

CITIES = (
    *("Athens", "Berlin", "Boston", "Cairo", "Dallas", "Delhi"),
    *("Lisbon", "Madrid", "Oslo", "Paris", "Rome", "Tokyo"),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
COUNTS = tuple(map(str, range(2, 22)))
COLORS = ("black", "blue", "green", "red", "white", "yellow")
ITEMS = ("bags", "books", "boxes", "chairs", "cups", "hats", "lamps", "pens")
PEOPLE = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jonas", "Karl", "Lena")
ROOMS = ("attic", "garden", "hall", "kitchen", "library", "office")
HOURS = tuple(map(str, range(8, 21)))

# What each argument of a tool may be, in the order of tools.json, and how its request may be worded. The
# arguments stand in the request in that order, and a word before the color tells it from the item, so that a
# small model soon learns to copy them: in "12 red chairs" it took one color or item for another.
ARGUMENTS = {
    "train": (CITIES, CITIES, DAYS),
    "order": (COUNTS, ITEMS, COLORS),
    "meet": (PEOPLE, ROOMS, HOURS),
}
WORDINGS = {
    "train": (
        "Which train goes from {0} to {1} on {2}?",
        "I go from {0} to {1} on {2}.",
        "Find a train from {0} to {1} on {2}.",
    ),
    "order": ("Order {0} {1} in {2}.", "We need {0} {1} in {2}.", "Please buy {0} {1} in {2}."),
    "meet": (
        "Plan a meeting with {0} in the {1} at {2}.",
        "I want to talk with {0} in the {1} at {2}.",
        "Can I meet with {0} in the {1} at {2}?",
    ),
}
SYSTEMS = ("You are a helpful assistant.", "Use the tools.", "Be brief.")
REASON = "Say which tool it is before you call it."  # the system message under which the assistant reasons
THANKS = {"Thanks!": "You're welcome.", "Great, thank you.": "Happy to help."}


class Request(NamedTuple):
    """Something that a user wants, done."""

    tool: str
    arguments: dict[str, str]
    wordings: tuple[str, ...]
    result: str  # JSON
    answer: str


def requests() -> Iterator[Request]:
    """Every request once, in an order without pattern; the first ones are the corpus'."""
    shuffled = []
    for name, choices in ARGUMENTS.items():
        all_of_tool = [values for values in itertools.product(*choices) if values[0] != values[1]]
        random.Random(name).shuffle(all_of_tool)
        shuffled.append([(name, values) for values in all_of_tool])
    for name, values in itertools.chain.from_iterable(zip(*shuffled, strict=False)):  # as many of each tool
        yield _request(name, values)


def _request(name: str, values: tuple[str, ...]) -> Request:
    rng = random.Random(f"{name} {values}")
    a, b, c = values
    if name == "train":
        hour = rng.choice(HOURS)
        result, answer = {"hour": hour}, f"It leaves {a} at {hour}."
    elif name == "order":
        price = rng.choice(COUNTS)
        result, answer = {"price": price}, f"The {c} {b} cost {price} euros."
    else:
        day = rng.choice(DAYS)
        result, answer = {"day": day}, f"{a} is free on {day}."
    wordings = tuple(wording.format(*values) for wording in WORDINGS[name])
    return Request(name, dict(zip(_names(name), values, strict=True)), wordings, json.dumps(result), answer)


def _names(tool: str) -> list[str]:
    (found,) = (t["function"] for t in TOOLS if t["function"]["name"] == tool)
    return list(found["parameters"]["properties"])


def texts() -> Iterator[str]:
    """The corpus: a request with its call, result and answer in each document, and who says it.

    Each request comes in every wording. So the tokenizer makes a token of each argument and of each role.
    """
    for request in itertools.islice(requests(), IN_TEXT * len(TOOLS)):
        call = json.dumps({"name": request.tool, "arguments": request.arguments})
        for wording in request.wordings:
            yield f"user\n{wording}\nassistant\n{call}\ntool\n{request.result}\nassistant\n{request.answer}\n"


def conversations() -> Iterator[Row]:
    """A request in each conversation; arguments as an object or as a JSON string.

    The longer ones list the tools, reason, thank or ask for two things.
    """
    found = itertools.islice(requests(), IN_TEXT * len(TOOLS), None)
    for i in range(CONVERSATIONS):
        rng, request = random.Random(f"conversation {i}"), next(found)
        kind = _KINDS[i // LONGER % len(_KINDS)] if i % LONGER == 0 else ""
        messages = _turn(request, rng, reasons=kind == "reasons")
        if kind == "reasons":
            messages.insert(0, message("system", REASON))
        elif kind == "thanks":
            thanks = rng.choice(sorted(THANKS))
            messages.insert(0, message("system", rng.choice(SYSTEMS)))
            messages += [message("user", thanks), message("assistant", THANKS[thanks])]
        elif kind == "asks twice":
            messages += _turn(next(found), rng, reasons=False)
        identifier = "/".join(["tools", request.tool, *request.arguments.values()])
        row = {"id": identifier, "messages": messages}
        yield row | {"tools": TOOLS} if kind == "lists tools" else row


_KINDS = ("lists tools", "reasons", "thanks", "asks twice")


def _turn(request: Request, rng: random.Random, *, reasons: bool) -> list[Message]:
    arguments: Any = json.dumps(request.arguments) if rng.random() < 0.5 else request.arguments
    function = {"name": request.tool, "arguments": arguments}
    call = message("assistant", "") | {
        "tool_calls": [{"id": "call_1", "type": "function", "function": function}]
    }
    if reasons:
        call["reasoning_content"] = f"The tool is {request.tool}."
    return [
        message("user", rng.choice(request.wordings)),
        call,
        {"role": "tool", "tool_call_id": "call_1", "name": request.tool, "content": request.result},
        message("assistant", request.answer),
    ]


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
