"""Short conversations to try templates with."""

from __future__ import annotations

from typing import Any

from snaketron.data.chats.messages import Message

QUESTION, ANSWER, RESULT = "What is 2 + 2?", "It is 4.", "42 apples"
TOOL = "weather"

PROBE: list[Message] = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": ANSWER},
]


def _called(*cities: str) -> list[Message]:
    calls = [
        {
            "id": f"call0000{number}",
            "type": "function",
            "function": {"name": TOOL, "arguments": {"city": city}},
        }
        for number, city in enumerate(cities, 1)
    ]
    return [PROBE[0], {"role": "assistant", "content": "", "tool_calls": calls}]


CALL = _called("Oslo")
TWO_CALLS = _called("Oslo", "Bergen")
CALLED: list[Message] = [
    *CALL,
    {"role": "tool", "tool_call_id": "call00001", "name": TOOL, "content": RESULT},
]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": TOOL,
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "The city."}},
                "required": ["city"],
            },
        },
    }
]
