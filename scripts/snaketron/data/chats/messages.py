"""The messages of raw files, brought into the one form that templates take.

A key of a message is understood, or refused, or given to the template; `Reader.unread` names those that only
the template could read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from snaketron.data import doubled_keys
from snaketron.data.chats.unusable import DOUBLED, NO_ROLE, THOUGHTS, Unusable
from snaketron.data.doubled_keys import DoubledKey

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING = ("reasoning_content", "thinking", "reasoning")  # keys in use, the usual one first
_ARGUMENTS = ("arguments", "parameters", "args", "input")  # keys in use, the usual one first
_TRAINED = ("weight", "train", "loss")  # keys in use: 1 or true where the answer is trained, else 0 or false
_CALLS = ("tool_calls", "function_call")
_CALL_TYPES = (None, "function", "tool_call", "tool_use")
_TEXT_TYPES = (None, "text", "input_text", "output_text")


@dataclass(frozen=True)
class Form:
    """How the messages of a source are written: the keys, the names of roles, the tags around thinking."""

    role: str = "role"
    content: str = "content"
    roles: Mapping[str, str] = field(default_factory=dict)
    thinking: tuple[str, str] | None = None


class Reader:
    """Reads the messages of one conversation, and keeps what is to be counted."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.untrained: set[int] = set()  # answers that are not to be trained
        self.num_nulls = 0  # calls with arguments that are null
        self.num_thoughts = 0  # answers whose thinking lay in the content
        self.unread: set[str] = set()  # keys that only the template could read

    def read(self, message: Any, number: int) -> Message:
        """Message `number` of a conversation in the form of `conversation`."""
        message, form = from_json(message), self.form
        if not isinstance(message, dict) or not isinstance(message.get(form.role), str):
            has = ", ".join(map(str, message)) if isinstance(message, dict) else type(message).__name__
            raise Unusable(NO_ROLE, f"message {number} has {has or 'nothing'}")
        given = {name: value for name, value in message.items() if value is not None}
        name = given.pop(form.role)
        role = {"function": "tool"}.get(form.roles.get(name, name), form.roles.get(name, name))
        if role not in ROLES:
            raise Unusable("unknown role", f"message {number} is by {name!r}; known: {', '.join(ROLES)}")
        checked = {"role": role, "content": self._text_of(given.pop(form.content, None), "content", number)}
        thoughts = {name: self._text_of(given.pop(name, None), name, number) for name in REASONING}
        calls = [from_json(given.pop(name, None)) for name in _CALLS]
        self._weigh(given, role, number)
        rest = {name: value for name, value in given.items() if name not in checked}
        self.unread |= given.keys() - {"id", "tool_call_id", *(["name"] if role == "tool" else [])}
        if role == "assistant":
            self._answer(checked, thoughts, calls, number, ", ".join(rest))
        else:
            held = thoughts | dict(zip(_CALLS, calls, strict=True))
            self.unread |= {f"{name} of {role}" for name, value in held.items() if value}
        return checked | rest

    def _text_of(self, content: Any, name: str, number: int) -> str:
        """The text of a string, of null, or of a list of text parts."""
        if content is None or isinstance(content, str):
            return content or ""
        parts = content if isinstance(content, list) else [None]
        texts = []
        for part in parts:
            text = part
            if isinstance(part, dict):
                if (kind := part.get("type")) not in _TEXT_TYPES:
                    raise Unusable(
                        "content that is not text", f"{name} of message {number} has a part of type {kind!r}"
                    )
                text = part.get("text")
                more = (key for key, value in part.items() if key not in ("type", "text") and value)
                self.unread |= {f"{key} of a part of {name}" for key in more}
            if not isinstance(text, str):
                raise Unusable("content that is not text", f"{name} of message {number}")
            texts.append(text)
        return "".join(texts)

    def _answer(
        self, checked: Message, thoughts: dict[str, str], calls: list[Any], number: int, others: str
    ) -> None:
        """Put reasoning and calls into the answer `checked`."""
        found = [text for text in thoughts.values() if text.strip()]
        if self.form.thinking:
            thought, checked["content"] = split_thinking(checked["content"], self.form.thinking, number)
            self.num_thoughts += thought is not None
            found += [thought] if thought else []
        if len({text.strip() for text in found}) > 1:
            raise Unusable(THOUGHTS, f"message {number} has it twice, and not the same")
        if found:
            checked["reasoning_content"] = found[0]
        many, one = calls
        if one and not isinstance(one, dict):
            raise Unusable("malformed tool call", f"function_call of message {number} is not an object")
        if isinstance(one, dict) and any(value is not None for value in one.values()):
            if many:
                raise Unusable("malformed tool call", f"message {number} has tool_calls and function_call")
            many = [one]
        if many and not isinstance(many, list):
            raise Unusable("malformed tool call", f"tool_calls of message {number} is not a list")
        if many:
            checked["tool_calls"] = [self._call(call, number) for call in many]
        elif not found and not checked["content"].strip():
            raise Unusable("an empty answer", f"message {number}{f' has only {others}' if others else ''}")

    def _weigh(self, given: Message, role: str, number: int) -> None:
        """Take the keys out of a message that say whether it is trained."""
        for name in _TRAINED:
            value = given.pop(name, None)
            if value is None:
                continue
            if value not in (0, 1):
                raise Unusable("a weight that is neither 0 nor 1", f"{name} of message {number} is {value!r}")
            if role == "assistant" and not value:
                self.untrained.add(number)
            elif role != "assistant" and value:
                self.unread.add(f"{name} of {role}")

    def _call(self, call: Any, number: int) -> Message:
        """A call as `{"type": "function", "function": {"name": ..., "arguments": {...}}}`, with its id."""
        call = from_json(call)
        function = from_json(call.get("function") or call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(name := function.get("name"), str) or not name:
            raise Unusable("malformed tool call", f"message {number} calls a function without a name")
        if call.get("type") not in _CALL_TYPES:
            raise Unusable("malformed tool call", f"message {number} has a call of type {call['type']!r}")
        given = {name: value for name, value in (call | function).items() if value is not None}
        spelled = [name for name in _ARGUMENTS if name in given]
        if len(spelled) > 1:
            raise Unusable("malformed tool call", f"message {number} has a call with {' and '.join(spelled)}")
        self.unread |= {
            f"{name} of a call"
            for name in given.keys() - {"id", "index", "type", "function", "name", *spelled}
        }
        arguments = given.get(spelled[0]) if spelled else None
        if isinstance(arguments, str) and arguments:
            try:
                arguments = doubled_keys.loads(arguments, parse_constant=_refuse)
            except DoubledKey as error:
                raise Unusable(DOUBLED, f"{error} of the arguments in message {number}") from None
            except (ValueError, RecursionError):
                raise Unusable("malformed tool call", f"arguments in message {number} are not JSON") from None
        if not isinstance(arguments, dict) and arguments not in (None, "", []):
            raise Unusable("malformed tool call", f"arguments in message {number} are not an object")
        if (wrong := _not_finite(arguments)) is not None:
            raise Unusable("malformed tool call", f"arguments in message {number} hold {wrong}, not JSON")
        self.num_nulls += None in (arguments or {}).values()
        named = {"id": call["id"]} if call.get("id") is not None else {}
        return named | {
            "type": "function",
            "function": {"name": name, "arguments": arguments or {}},
        }


def split_thinking(content: str, tags: tuple[str, str], number: int) -> tuple[str | None, str]:
    """Thinking and answer of a content; None for thinking when there is none.

    Content that begins with the opening tag has thinking, up to the closing tag. So has content without an
    opening tag in which the closing tag is a line of its own: the prompt has opened the thinking then.
    """
    opening, closing = tags
    before, closed, rest = content.partition(closing)
    if before.lstrip().startswith(opening):
        if not closed:
            raise Unusable(THOUGHTS, f"message {number} begins with {opening} and has no {closing}")
        before = before.lstrip().removeprefix(opening)
    elif not closed or opening in content or not _alone(before, rest):
        return None, content
    if opening in before or opening in rest:
        raise Unusable(THOUGHTS, f"message {number} has {opening} more than once")
    return before.strip(), rest.lstrip("\r\n")


def _alone(before: str, rest: str) -> bool:
    """Whether what stands between two texts is a line of its own."""
    return (not before.strip() or before.rstrip(" \t").endswith("\n")) and not rest.partition("\n")[0].strip()


def from_json(value: Any) -> Any:
    """The value that JSON text stands for; other values, and other text, stay as they are."""
    if not isinstance(value, str):
        return value
    try:
        return doubled_keys.loads(value, parse_constant=_refuse)
    except DoubledKey as error:
        raise Unusable(DOUBLED, str(error)) from None
    except (ValueError, RecursionError):
        return value


def of_arrow(value: Any) -> Any:
    """A value of Arrow as it would be in JSON: bytes are text, and a map, a list of pairs, is an object.

    Keys of a struct that are null are left out, for it has the keys of all structs of its column. Bytes that
    are not UTF-8 become lone surrogates.
    """
    if isinstance(value, dict):
        return {name: of_arrow(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        if not value or not all(isinstance(item, tuple) for item in value):
            return [of_arrow(item) for item in value]
        found = {str(of_arrow(name)): of_arrow(item) for name, item in value}
        if len(found) < len(value):
            raise Unusable(DOUBLED, f"in a map with the keys {', '.join(str(name) for name, _ in value)}")
        return found
    return value.decode(errors="surrogateescape") if isinstance(value, bytes) else value


def _not_finite(value: Any) -> float | None:
    """A number in a value that is infinite or none, which JSON cannot write; None where there is none."""
    if isinstance(value, float):
        return None if math.isfinite(value) else value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((wrong for item in inner if (wrong := _not_finite(item)) is not None), None)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
