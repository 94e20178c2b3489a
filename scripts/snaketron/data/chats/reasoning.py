"""Reasoning modes: conversations with their reasoning, without it, of low effort, or cut to a budget."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from snaketron.data.chats.conversation import Conversation
from snaketron.data.chats.messages import Message
from snaketron.settings.chats import RenderSettings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NONE, FULL, STRIPPED, LOW_EFFORT, TRUNCATED = MODES = (
    "none",  # it never had reasoning
    "full",
    "stripped",
    "low_effort",
    "truncated",
)


def draw(settings: RenderSettings, conversation: Conversation, purpose: str) -> float:
    """A number in [0, 1) for a conversation, the same wherever and in whatever order it is read."""
    digest = hashlib.blake2b(f"{settings.seed} {purpose} ".encode() + conversation.json, digest_size=8)
    return (int.from_bytes(digest.digest(), "big") >> 11) / 2**53


def choose(settings: RenderSettings, conversation: Conversation) -> str:
    """The mode of a conversation, one of `MODES`."""
    if not conversation.reasons:
        return NONE
    reasoning = settings.reasoning
    shares = {STRIPPED: reasoning.stripped, LOW_EFFORT: reasoning.low_effort, TRUNCATED: reasoning.truncated}
    if not any(shares.values()):
        return FULL
    position = draw(settings, conversation, "mode")
    for mode, share in shares.items():
        position -= share
        if position < 0:
            return FULL if mode == STRIPPED and only_reasons(conversation) else mode
    return FULL


def only_reasons(conversation: Conversation) -> bool:
    """Whether an answer would be empty without its reasoning."""
    return any(
        message["role"] == "assistant" and not message["content"].strip() and not message.get("tool_calls")
        for message in conversation.messages
    )


def without(conversation: Conversation) -> Conversation:
    """The conversation without reasoning."""
    messages = [
        {name: value for name, value in message.items() if name != "reasoning_content"}
        for message in conversation.messages
    ]
    return replace(conversation, messages=messages)


@dataclass(frozen=True)
class Cut:
    """Messages whose reasoning has at most `budget` tokens."""

    messages: list[Message]
    budget: int


def cut(
    tokenizer: Tokenizer, messages: Sequence[Message], first: int, least: int, position: float
) -> Cut | None:
    """Cut the reasoning in messages[first:] to a budget; None when none has more than `least` tokens.

    The budget lies between `least` and one token less than the longest reasoning has; `position` in [0, 1)
    says where.
    """
    encoded = {
        number: tokenizer.encode(message["reasoning_content"], add_special_tokens=False)
        for number, message in enumerate(messages)
        if number >= first and "reasoning_content" in message
    }
    longest = max((len(encoding) for encoding in encoded.values()), default=0)
    if longest <= least:
        return None
    budget = least + int(position * (longest - least))
    changed: list[Message] = [dict(message) for message in messages]
    for number, encoding in encoded.items():
        if len(encoding) > budget:
            text: Any = changed[number]["reasoning_content"]
            changed[number]["reasoning_content"] = text[: encoding.offsets[budget - 1][1]]
    return Cut(changed, budget)
