"""Conversations in the OpenAI format: checked, and brought into one form."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from snaketron.data.chats.messages import Form, Message, Reader, from_json
from snaketron.data.chats.unusable import NOT_UNICODE, Unusable

import orjson

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Span = tuple[int, int]

# `marks` marks places in a text with these Unicode noncharacters, so no text may hold them.
NONCHARACTERS = ("\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3")


@dataclass(frozen=True)
class Conversation:
    """Messages and tools in the form that templates take; see `conversation`."""

    messages: list[Message]
    tools: list[Any] | None
    untrained: frozenset[int] = frozenset()  # the numbers of answers that are not trained
    num_thoughts: int = field(default=0, compare=False)  # answers whose thinking lay in the content
    num_nulls: int = field(default=0, compare=False)  # calls with arguments that are null
    unread: frozenset[str] = field(default=frozenset(), compare=False)  # keys that only a template could read

    @cached_property
    def json(self) -> bytes:
        """Messages and tools as JSON, with text for what it does not have; `Unusable` for lone surrogates."""
        try:
            return orjson.dumps([self.messages, self.tools], default=str)
        except TypeError:  # numbers of more than 64 bits, or lone surrogates
            try:
                return json.dumps([self.messages, self.tools], ensure_ascii=False, default=str).encode()
            except UnicodeEncodeError:
                raise Unusable(NOT_UNICODE, "a lone surrogate in a text that is JSON") from None

    @property
    def reasons(self) -> bool:
        """Whether an answer has reasoning."""
        return any("reasoning_content" in message for message in self.messages)

    @property
    def turns(self) -> list[tuple[int, int, int]]:
        """The user's turns with a trained answer: (number, first message, message after the answer).

        Turns with any answer are numbered, from 1.
        """
        roles = [message["role"] for message in self.messages]
        firsts = [i for i, role in enumerate(roles) if role == "user" and (i == 0 or roles[i - 1] != "user")]
        found, number = [], 0
        for first, end in pairwise([0, *firsts[1:], len(roles)]):
            answers = [i for i in range(first, end) if roles[i] == "assistant"]
            trained = [i for i in answers if i not in self.untrained]
            number += bool(answers)
            if trained:
                found.append((number, first, trained[-1] + 1))
        return found


def conversation(
    messages: Any, tools: Any = None, *, system: Any = None, functions: Any = None, form: Form | None = None
) -> Conversation:
    """A checked conversation in the OpenAI format; `Unusable` says why it is none.

    All arguments may be JSON text, and so may messages, tools and calls one by one: Parquet cannot hold tools
    of different shapes otherwise. Whatever form it has, a conversation comes out in one: content is a string,
    reasoning lies in `reasoning_content`, the arguments of a call are an object, and keys without a value
    are left out. `system` is the text of a system message, `functions` are tools in OpenAI's older form.
    """
    messages = from_json(messages)
    if not messages:
        raise Unusable("no messages")
    if not isinstance(messages, list):
        raise Unusable("messages are not a list", type(messages).__name__)
    reader = Reader(form or Form())
    checked = [reader.read(message, number) for number, message in enumerate(messages)]
    untrained = reader.untrained
    if system:
        first = Reader(Form()).read({"role": "system", "content": system}, 0)
        if checked[0]["role"] != "system":
            checked, untrained = [first, *checked], {number + 1 for number in untrained}
        elif checked[0]["content"].strip() != first["content"].strip():
            raise Unusable("two system messages", "the first message, and the field of the row")
    answers = {number for number, message in enumerate(checked) if message["role"] == "assistant"}
    if not answers:
        raise Unusable("no assistant message")
    if answers <= untrained:
        raise Unusable("nothing to train on", "the file gives every answer the weight 0")
    return Conversation(
        checked,
        _tools(tools, functions, reader.unread),
        frozenset(untrained),
        reader.num_thoughts,
        reader.num_nulls,
        frozenset(reader.unread),
    )


def _tools(tools: Any, functions: Any, unread: set[str]) -> list[Any] | None:
    """The tools of a conversation; adds `functions` beside them to what is `unread`."""
    tools, functions = from_json(tools), from_json(functions)
    if tools and functions:
        unread.add("functions of the row")
    found = tools or functions or []
    if not isinstance(found, list):
        raise Unusable("tools are not a list of objects", type(found).__name__)
    found = [from_json(tool) for tool in found]
    if not all(isinstance(tool, dict) for tool in found):
        raise Unusable("tools are not a list of objects", "list")
    if not found:
        return None
    return found if tools else [{"type": "function", "function": tool} for tool in found]


def control_tokens(tokenizer: Tokenizer, allowed: Collection[str] = ()) -> re.Pattern[str] | None:
    """Matches the special tokens of a tokenizer, but for those `allowed`; None when it has none."""
    added = tokenizer.get_added_tokens_decoder().values()
    names = [t.content for t in added if t.special and t.content.strip() and t.content not in allowed]
    return re.compile("|".join(map(re.escape, names))) if names else None


def check_text(conversation: Conversation, control_tokens: re.Pattern[str] | None) -> None:
    """Raise `Unusable` when a text holds a control token or one of `NONCHARACTERS`.

    A control token in a text would end a turn where none ends.
    """
    text = conversation.json.decode()
    plain = text.replace('\\"', '"').replace("\\\\", "\\")  # a token may hold what JSON escapes
    if control_tokens and (found := control_tokens.search(plain)):
        raise Unusable("a control token in the text", found.group())
    if found := re.search("|".join(NONCHARACTERS), text):
        raise Unusable(NOT_UNICODE, f"it holds the noncharacter U+{ord(found.group()):04X}")
