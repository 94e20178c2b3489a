"""From a conversation to token ids and a mask of what the assistant said.

The template is rendered once, whole, and the text is tokenized once, whole, so training sees the ids that
`apply_chat_template` gives at inference. What is trained is what the template writes between
`{% generation %}` and `{% endgeneration %}`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snaketron.files import read_json
from snaketron.log import UserError

import jinja2
import jinja2.ext
import jinja2.sandbox
import numpy as np
from jinja2 import nodes
from jinja2.parser import Parser

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Span = tuple[int, int]
Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")

_REASONING = ("reasoning_content", "thinking", "reasoning")  # names in use; the first is the usual one

# Unicode noncharacters, which no text may hold, mark the ends of a span until it is rendered. Unlike the
# offsets that transformers counts, they stay right when the block lies in a macro or in `{% set %}`.
_START, _END = "\ufdd0", "\ufdd1"


class Unusable(ValueError):
    """A conversation that is dropped: the reason, which is counted, and details of this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


# ----------------------------------------------------------------------------------------- template


class _Generation(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: what stands in it is output of the assistant."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own declaration)

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        environment.extend(num_generation_blocks=0)

    def parse(self, parser: Parser) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        self.environment.num_generation_blocks += 1  # type: ignore[attr-defined]
        return nodes.CallBlock(self.call_method("_mark"), [], [], body, lineno=line)

    def _mark(self, caller: Any) -> str:
        return f"{_START}{caller()}{_END}"


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the HTML escapes of jinja2's own filter, as transformers does it."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def compile_template(
    source: str, *, name: str = "chat template", variables: Mapping[str, str] | None = None
) -> jinja2.Template:
    """Compile a chat template in the environment that transformers gives it.

    `variables` are the names of special tokens (`bos_token`, ...) that some templates use. There is no
    `strftime_now`: a template that asks for the date would render other text every day.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    try:
        template = environment.from_string(source, globals=dict(variables or {}))
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{name}:{error.lineno}: the chat template does not parse: {error.message}") from None
    if not environment.num_generation_blocks:  # type: ignore[attr-defined]
        raise UserError(
            f"{name}: the chat template does not say what the assistant writes; put its output, with the "
            "token that ends its turn, between {% generation %} and {% endgeneration %}"
        )
    return template


def load_template(path: Path, variables: Mapping[str, str] | None = None) -> jinja2.Template:
    """Compile the chat template of a file."""
    try:
        source = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such chat template (rule install_chat_template)") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: invalid UTF-8 ({error.reason} at byte {error.start})") from None
    return compile_template(source, name=str(path), variables=variables)


def render(
    template: jinja2.Template, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None = None
) -> tuple[str, list[Span]]:
    """The text of a conversation and the spans of it, in characters, that the assistant wrote."""
    given = _all_text(messages, tools)
    if _START in given or _END in given:
        raise Unusable("not Unicode text", "it holds the noncharacter U+FDD0 or U+FDD1")
    try:
        marked = template.render(
            messages=[_with_reasoning(m) for m in messages], tools=tools, add_generation_prompt=False
        )
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise Unusable("the template refuses it", str(error)) from None
    text, spans, start = [], [], None
    position = 0
    for piece in re.split(f"([{_START}{_END}])", marked):
        if piece == _START and start is None:
            start = position
        elif piece == _END and start is not None:
            spans.append((start, position))
            start = None
        elif piece in (_START, _END):
            raise Unusable("the template refuses it", "a generation block lies in another one")
        else:
            text.append(piece)
            position += len(piece)
    joined = "".join(text)
    try:
        joined.encode()
    except UnicodeEncodeError as error:
        raise Unusable("not Unicode text", str(error)) from None
    return joined, spans


def _all_text(messages: Any, tools: Any) -> str:
    return json.dumps([messages, tools], ensure_ascii=False, default=str)


def _with_reasoning(message: Mapping[str, Any]) -> Message:
    """The message with its reasoning under the name that templates read (transformers does the same)."""
    reasoning = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def special_tokens(directory: Path) -> dict[str, str]:
    """The names of special tokens that templates may use (`bos_token`, ...), from tokenizer_config.json."""
    path = directory / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    contents = {n: v.get("content") if isinstance(v, dict) else v for n, v in named.items()}
    return {name: content for name, content in contents.items() if isinstance(content, str)}


# ------------------------------------------------------------------------------------------- tokens


def tokenize(tokenizer: Tokenizer, text: str, spans: Iterable[Span]) -> tuple[np.ndarray, np.ndarray]:
    """Ids (int32) of the text, and for each whether it is output of the assistant (uint8)."""
    return masked(tokenizer.encode(text, add_special_tokens=False), spans)


def masked(encoding: Encoding, spans: Iterable[Span]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of an encoded text: a token is trained if it lies wholly inside a span."""
    input_ids = np.array(encoding.ids, dtype=np.int32)
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    loss_mask = np.zeros(len(input_ids), dtype=np.uint8)
    starts, ends = offsets[:, 0], offsets[:, 1]
    for start, end in spans:
        # Some tokenizers cut spaces off the offsets: a token of spaces only is empty, and lies at its end.
        after = (starts >= start) & ((starts < ends) | (starts > start))
        loss_mask[after & (ends <= end)] = 1
    return input_ids, loss_mask


# ----------------------------------------------------------------------------------------- messages


@dataclass(frozen=True)
class Conversation:
    messages: list[Message]
    tools: list[Any] | None


def conversation(messages: Any, tools: Any = None) -> Conversation:
    """A checked conversation in the OpenAI format; `Unusable` says why it is none.

    Both arguments may be JSON text: Parquet cannot hold tools of different shapes otherwise.
    """
    messages, tools = _from_json(messages), _from_json(tools)
    if not messages:
        raise Unusable("no messages")
    if not isinstance(messages, list):
        raise Unusable("messages are not a list", type(messages).__name__)
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Unusable("tools are not a list of objects", type(tools).__name__)
    for number, message in enumerate(messages):
        _check(message, number)
    if not any(message["role"] == "assistant" for message in messages):
        raise Unusable("no assistant message")
    return Conversation(messages, tools or None)


def _from_json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _check(message: Any, number: int) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        has = ", ".join(map(str, message)) if isinstance(message, dict) else type(message).__name__
        raise Unusable("a message without a role", f"message {number} has {has or 'nothing'}")
    role = message["role"]
    if role not in ROLES:
        raise Unusable("unknown role", f"message {number} is by {role!r}; known: {', '.join(ROLES)}")
    for name in ("content", *_REASONING):
        try:
            _text_of(message.get(name))
        except TypeError:
            raise Unusable("content that is not text", f"{name} of message {number}") from None
    if role == "assistant":
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list):
            raise Unusable("malformed tool call", f"tool_calls of message {number} is not a list")
        for call in calls:
            _check_call(call, number)
        if not calls and not any(_text_of(message.get(name)).strip() for name in ("content", *_REASONING)):
            raise Unusable("an empty answer", f"message {number}")


def _text_of(content: Any) -> str:
    """The text of a string, of null, or of a list of text parts; TypeError when it is anything else."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise TypeError
    return "".join(part["text"] if isinstance(part, dict) and "text" in part else part for part in content)


def _check_call(call: Any, number: int) -> None:
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


def control_tokens(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Matches the tokens that steer a conversation, such as <|im_end|>; None when the tokenizer has none."""
    added = tokenizer.get_added_tokens_decoder().values()
    names = [t.content for t in added if t.special and t.content.startswith("<|")]
    return re.compile("|".join(map(re.escape, names))) if names else None


def check_control_tokens(conversation: Conversation, pattern: re.Pattern[str]) -> None:
    """`Unusable` when a text holds a control token: it would end a turn where none ends."""
    found = pattern.search(_all_text(conversation.messages, conversation.tools))
    if found:
        raise Unusable("a control token in the text", found.group())
