"""Conversations in the OpenAI format: checked, and brought into one form."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Span = tuple[int, int]
Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
_REASONING = ("reasoning_content", "thinking", "reasoning")  # keys in use, the usual one first
# `marks` marks places in a text with these Unicode noncharacters, so no text may hold them.
NONCHARACTERS = ("\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3")

NOT_UNICODE = "not Unicode text"
REFUSED = "the template refuses it"
LEFT_OUT = "the template leaves out a message"
NO_PROMPT = "an answer that does not begin with its prompt"
NO_END = "an answer without the token that ends it"

# What to do about dropped rows, by the reason for which they were dropped.
ADVICE = {
    "no messages": "remove the row, or name the field that holds them in messages_field",
    "messages are not a list": "give a list of objects with role and content",
    "tools are not a list of objects": "give a list of JSON schemas, or name their field in tools_field",
    "no assistant message": "there is nothing to train on; remove the row",
    "a message without a role": "rename its keys to role and content",
    "unknown role": "rename it",
    "content that is not text": "give text, or a list of text parts; images are not trained",
    "malformed tool call": 'give {"function": {"name": ..., "arguments": {...}}}',
    "an empty answer": "remove the message, or the row",
    "a control token in the text": "remove it from the text: the template writes these tokens",
    NOT_UNICODE: "correct the text",
    REFUSED: "give what the template wants, or another template (chat_template of the source)",
    LEFT_OUT: "use a template that writes it (chat_template of the source)",
    NO_PROMPT: "use a template with generation blocks (chat_template of the source)",
    NO_END: "use a template with generation blocks (chat_template of the source)",
    "nothing to train on": "remove the row, or correct the template",
}


class Unusable(ValueError):
    """A conversation that is dropped: the reason, which is counted, and details of this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


# ----------------------------------------------------------------------------------------- messages


@dataclass(frozen=True)
class Conversation:
    """Messages and tools in the form that templates take; see `conversation`."""

    messages: list[Message]
    tools: list[Any] | None

    @cached_property
    def json(self) -> bytes:
        """Messages and tools as JSON; `Unusable` when a text holds lone surrogates."""
        try:
            return orjson.dumps([self.messages, self.tools])
        except TypeError:  # numbers of more than 64 bits, or lone surrogates
            try:
                return json.dumps([self.messages, self.tools], ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                raise Unusable(NOT_UNICODE, str(error)) from None

    @property
    def reasons(self) -> bool:
        """Whether an answer has reasoning."""
        return any("reasoning_content" in message for message in self.messages)

    @property
    def turns(self) -> list[tuple[int, int]]:
        """For each answered turn of the user: its first message, and the message after its last answer."""
        roles = [message["role"] for message in self.messages]
        firsts = [i for i, role in enumerate(roles) if role == "user" and (i == 0 or roles[i - 1] != "user")]
        bounds = [0, *firsts[1:], len(roles)]
        found = []
        for first, end in pairwise(bounds):
            if answers := [i for i in range(first, end) if roles[i] == "assistant"]:
                found.append((first, answers[-1] + 1))
        return found


def conversation(messages: Any, tools: Any = None) -> Conversation:
    """A checked conversation in the OpenAI format; `Unusable` says why it is none.

    Both arguments may be JSON text: Parquet cannot hold tools of different shapes otherwise. Whatever form it
    has, a conversation comes out in one: content is a string, reasoning lies in `reasoning_content`, the
    arguments of a call are an object, and keys without a value (null in Parquet) are left out.
    """
    messages, tools = _from_json(messages), _from_json(tools)
    if not messages:
        raise Unusable("no messages")
    if not isinstance(messages, list):
        raise Unusable("messages are not a list", type(messages).__name__)
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Unusable("tools are not a list of objects", type(tools).__name__)
    checked = [_checked(message, number) for number, message in enumerate(messages)]
    if not any(message["role"] == "assistant" for message in checked):
        raise Unusable("no assistant message")
    return Conversation(checked, tools or None)


def _from_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _checked(message: Any, number: int) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        has = ", ".join(map(str, message)) if isinstance(message, dict) else type(message).__name__
        raise Unusable("a message without a role", f"message {number} has {has or 'nothing'}")
    role = message["role"]
    if role not in ROLES:
        raise Unusable("unknown role", f"message {number} is by {role!r}; known: {', '.join(ROLES)}")
    texts = {}
    for name in ("content", *_REASONING):
        try:
            texts[name] = _text_of(message.get(name))
        except TypeError:
            raise Unusable("content that is not text", f"{name} of message {number}") from None
    known = ("role", "content", "tool_calls", *_REASONING)
    rest = {name: value for name, value in message.items() if value is not None and name not in known}
    checked = {"role": role, "content": texts["content"], **rest}
    if role == "assistant":
        if reasoning := next((texts[name] for name in _REASONING if texts[name].strip()), ""):
            checked["reasoning_content"] = reasoning
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list):
            raise Unusable("malformed tool call", f"tool_calls of message {number} is not a list")
        if calls:
            checked["tool_calls"] = [_call(call, number) for call in calls]
        elif not reasoning and not texts["content"].strip():
            raise Unusable("an empty answer", f"message {number}")
    return checked


def _text_of(content: Any) -> str:
    """The text of a string, of null, or of a list of text parts; TypeError when it is anything else."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise TypeError
    return "".join(part["text"] if isinstance(part, dict) and "text" in part else part for part in content)


def _call(call: Any, number: int) -> Message:
    """A call as `{"type": "function", "function": {"name": ..., "arguments": {...}}}`, with its id."""
    function = (call.get("function") or call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unusable("malformed tool call", f"message {number} calls a function without a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments:
        try:
            arguments = json.loads(arguments)
        except ValueError:
            raise Unusable("malformed tool call", f"arguments in message {number} are not JSON") from None
    if arguments and not isinstance(arguments, dict):
        raise Unusable("malformed tool call", f"arguments in message {number} are not an object")
    named = {"id": call["id"]} if call.get("id") is not None else {}
    return named | {
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments or {}},
    }


def control_tokens(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Matches the tokens that steer a conversation, such as <|im_end|>; None when the tokenizer has none."""
    added = tokenizer.get_added_tokens_decoder().values()
    names = [t.content for t in added if t.special and t.content.startswith("<|")]
    return re.compile("|".join(map(re.escape, names))) if names else None


def check_text(conversation: Conversation, control_tokens: re.Pattern[str] | None) -> None:
    """Raise `Unusable` when a text holds a control token or one of `NONCHARACTERS`.

    A control token in a text would end a turn where none ends.
    """
    text = conversation.json.decode()
    if control_tokens and (found := control_tokens.search(text)):
        raise Unusable("a control token in the text", found.group())
    if found := re.search("|".join(NONCHARACTERS), text):
        raise Unusable(NOT_UNICODE, f"it holds the noncharacter U+{ord(found.group()):04X}")
