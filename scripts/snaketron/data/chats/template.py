"""Chat templates: from a conversation to text, and the spans of it that the assistant wrote.

A template is rendered once, whole, and the text is tokenized once, whole, so training sees the ids that
`apply_chat_template` gives at inference. The template marks what is trained by
`{% generation %}` and `{% endgeneration %}`. For a template without these marks, `Template` finds it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from snaketron.data.chats.conversation import (
    LEFT_OUT,
    NO_PROMPT,
    REFUSED,
    ROLES,
    Message,
    Span,
    Unusable,
)
from snaketron.data.chats.marks import (
    MARK_IT,
    OWNS,
    Generation,
    Rendered,
    marked_spans,
    owner_mark,
    piece_of,
    pieces_of,
    show_owners,
    unmarked,
)
from snaketron.files import read_json
from snaketron.log import UserError

import jinja2
import jinja2.ext
import jinja2.sandbox

_QUESTION, _ANSWER, _RESULT = "What is 2 + 2?", "It is 4.", "42 apples"  # to try templates with


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of jinja2's own filter, like the filter of transformers."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class Template:
    """A chat template with its arguments, compiled in the environment that transformers gives it.

    A template without generation blocks must loop over the messages outside of macros. The text that it
    writes for an assistant's message is a turn. The turn begins with the prompt, which is the text that
    `add_generation_prompt` adds; it ends with the token that ends a turn, and perhaps white space. Rendering
    a few short conversations finds the prompts; `check` compares them with the text that inference is given.
    """

    def __init__(
        self,
        source: str,
        *,
        name: str = "chat template",
        variables: Mapping[str, str] | None = None,
        arguments: Mapping[str, Any] | None = None,
        off_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.arguments = dict(arguments or {})
        self.off_arguments = dict(off_arguments or {})
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        try:
            parsed = environment.parse(source)
            parsed.body = show_owners(parsed.body)
            parsed.set_environment(environment)
            code = environment.compile(parsed)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"{name}:{error.lineno}: the chat template does not parse: {error.message}"
            ) from None
        self.marked = environment.num_generation_blocks > 0  # type: ignore[attr-defined]
        made = jinja2.Template.from_code(environment, code, environment.make_globals(dict(variables or {})))
        self._template = made
        if not self.marked:
            self._probe()

    # -------------------------------------------------------------------------------- rendering

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """The text of a conversation, and the spans that the assistant wrote. Takes linear time."""
        marked = self._write(messages, tools, arguments, False)
        if self.marked:
            return marked_spans(marked)
        text, pieces = pieces_of(marked)
        spans: list[Span] = []
        owners: list[int | None] = []
        for number, message in enumerate(messages):
            if message["role"] not in (
                "assistant",
                "tool",
            ):  # a template may write the others before its loop
                continue
            piece = piece_of(pieces, number, self.name)
            if message["role"] == "assistant":
                _check_written(message, piece[1], number)
                spans.append(self._span(piece, number, messages))
                owners.append(number)
        return Rendered(text, spans, owners)

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The text that inference gives the model so that it answers `messages`."""
        return unmarked(self._write(messages, tools, arguments, True))

    def _write(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        arguments: Mapping[str, Any] | None,
        add_generation_prompt: bool,
    ) -> str:
        given = [self._message(message) for message in messages]
        numbers = {id(message): number for number, message in enumerate(given)}

        def owns(value: Any, depth: int) -> str:
            number = numbers.get(id(value))
            return "" if number is None else owner_mark(depth, number)

        merged = self.arguments | dict(arguments or {})
        variables = {"chat_template_kwargs": merged, "documents": None} | merged
        variables |= {"messages": given, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(variables | {OWNS: owns})
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
        ) as error:
            raise Unusable(REFUSED, str(error)) from None

    # ------------------------------------------------------------------ what the template can do

    def _message(self, message: Mapping[str, Any]) -> Message:
        """The message in the form that the template takes."""
        given = dict(message)
        if given["role"] == "developer" and "developer" not in self.roles:
            given["role"] = "system"
        if given["role"] not in self.roles:
            raise Unusable(LEFT_OUT, f"it writes none by {given['role']!r}")
        if (reasoning := given.get("reasoning_content")) is not None:
            given.setdefault("thinking", reasoning)  # some templates read this name, transformers gives both
        if given.get("tool_calls") and self.arguments_as_text:
            given["tool_calls"] = [
                {**call, "function": call["function"] | {"arguments": _tojson(call["function"]["arguments"])}}
                for call in given["tool_calls"]
            ]
        return given

    @cached_property
    def roles(self) -> set[str]:
        """The roles whose messages the template writes; it leaves out those of other roles in silence."""
        self.__dict__["roles"] = set(ROLES)  # while they are tried
        tried = {role: [{"role": role, "content": _RESULT}, *PROBE] for role in ("system", "developer")}
        tried["tool"] = [*_CALLED, PROBE[1]]
        return {"user", "assistant"} | {role for role, chat in tried.items() if self._writes(chat, _RESULT)}

    @cached_property
    def writes_reasoning(self) -> bool:
        return self._writes([PROBE[0], PROBE[1] | {"reasoning_content": _RESULT}], _RESULT)

    @cached_property
    def arguments_as_text(self) -> bool:
        """Whether the template takes the arguments of a call as JSON text only; most take the object."""
        self.__dict__["arguments_as_text"] = False  # while it is tried
        if self._writes(_CALL, "Oslo") and not self._writes(_CALL, "{'city': 'Oslo'}"):
            return False
        self.__dict__["arguments_as_text"] = True
        return self._writes(_CALL, '"Oslo"')

    def _writes(self, messages: Sequence[Message], text: str) -> bool:
        for tools in (None, _TOOLS):
            try:
                if text in self._write(messages, tools, None, False):
                    return True
            except Unusable:
                continue
        return False

    # ------------------------------------------------- templates that do not mark what is generated

    def _probe(self) -> None:
        """Find the prompts of an answer after a user's message, and after a tool's result."""
        self._prompts: dict[str, set[str]] = {"user": set(), "tool": set()}
        self._headers: set[str] = set()  # stand before answers that no prompt fits, as in a shortened history
        tried = {
            "user": [[PROBE[0]], [*PROBE, PROBE[0]]],
            "tool": [_CALLED],
        }
        for role, chats in tried.items():
            for before in chats:
                for arguments in ({}, self.off_arguments):
                    try:
                        self._try(role, before, arguments)
                    except Unusable as error:
                        if role == "user" and not arguments:
                            fix = f"; {MARK_IT}" if error.reason == LEFT_OUT else ""
                            problem = f"cannot render a question and an answer: {error}{fix}"
                            raise UserError(f"{self.name}: {problem}") from None
        self._prompts["tool"] = self._prompts["tool"] or self._prompts["user"]

    def _try(self, role: str, before: list[Message], arguments: Mapping[str, Any]) -> None:
        text, pieces = pieces_of(self._write([*before, PROBE[1]], None, arguments, False))
        for number, message in enumerate([*before, PROBE[1]]):
            if message is not PROBE[1]:
                continue
            start, written = piece_of(pieces, number, self.name)
            header, found, rest = written.partition(_ANSWER)
            if not found or not rest.strip():
                raise UserError(
                    f"{self.name}: the chat template has no generation blocks, and "
                    + (
                        "ends the assistant's turn with nothing"
                        if found
                        else "changes what the assistant says"
                    )
                    + f"; {MARK_IT}"
                )
            self._headers.add(header)
            prompt = self.prompt(before, None, arguments)
            if number == len(before) and prompt.startswith(text[:start]):
                self._prompts[role].add(prompt[start:])

    def _span(self, piece: tuple[int, str], number: int, messages: Sequence[Mapping[str, Any]]) -> Span:
        start, written = piece
        after = messages[number - 1]["role"] if number else ""
        prompts = self._prompts["tool" if after == "tool" else "user"]
        for known in (prompts, self._headers):
            if fitting := [prompt for prompt in known if written.startswith(prompt)]:
                begin, end = start + len(max(fitting, key=len)), start + len(written.rstrip())
                if begin < end:
                    return begin, end
        raise Unusable(NO_PROMPT, f"message {number} is written as {written[:60]!r}")

    def check(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        arguments: Mapping[str, Any] | None,
        rendered: Rendered,
    ) -> None:
        """Raise `UserError` where inference would not be given the text that stands before an answer.

        Compared are the first two answers and the last one of the last turn. For templates without generation
        blocks, whose prompts were found by trying.
        """
        last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        asked = [
            (start, owner)
            for (start, _), owner in zip(rendered.spans, rendered.owners, strict=True)
            if owner and owner > last and messages[owner - 1]["role"] != "assistant"
        ]
        for start, owner in dict.fromkeys([*asked[:2], *asked[-1:]]):  # a turn may have hundreds of calls
            before = rendered.text[:start]
            given = self.prompt(messages[:owner], tools, arguments)
            if before == given:
                continue
            known = self._prompts["tool" if messages[owner - 1]["role"] == "tool" else "user"]
            if _without(before, known) & _without(
                given, known
            ):  # they differ in the prompt only, as with and without reasoning
                continue
            raise UserError(
                f"{self.name}: message {owner} of a conversation is not written as inference asks for it: "
                f"before it stands {before[-60:]!r}, but inference gives the model {given[-60:]!r}; set "
                f"template_arguments so that they agree, or {MARK_IT}"
            )


PROBE: list[Message] = [
    {"role": "user", "content": _QUESTION},
    {"role": "assistant", "content": _ANSWER},
]
_CALL: list[Message] = [
    PROBE[0],
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "call00001",
                "type": "function",
                "function": {"name": "weather", "arguments": {"city": "Oslo"}},
            }
        ],
    },
]
_TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
_CALLED: list[Message] = [
    *_CALL,
    {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": _RESULT},
]


def compile_template(
    source: str,
    *,
    name: str = "chat template",
    variables: Mapping[str, str] | None = None,
    arguments: Mapping[str, Any] | None = None,
    off_arguments: Mapping[str, Any] | None = None,
) -> Template:
    """Compile a chat template; `UserError` when it does not parse, or does not show what is generated.

    `variables` are the special tokens (`bos_token`, ...) that some templates use. `arguments` come from the
    configuration; a conversation without reasoning also gets `off_arguments`. There is no `strftime_now`: a
    template that asks for the date would render other text every day.
    """
    return Template(source, name=name, variables=variables, arguments=arguments, off_arguments=off_arguments)


def load_template(path: Path, variables: Mapping[str, str] | None = None, **arguments: Any) -> Template:
    """Compile the chat template of a file; see `compile_template`."""
    try:
        source = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such chat template (rule install_chat_template)") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: invalid UTF-8 ({error.reason} at byte {error.start})") from None
    return compile_template(source, name=str(path), variables=variables, **arguments)


def _without(text: str, endings: Iterable[str]) -> set[str]:
    return {text.removesuffix(ending) for ending in endings if text.endswith(ending)}


def _check_written(message: Mapping[str, Any], written: str, number: int) -> None:
    """Raise `Unusable` when the assistant's content, or a call, is not in the text `written` for it."""
    content = message["content"].strip()
    if content not in written and "</think>" not in content:  # templates take reasoning out of the content
        raise Unusable(LEFT_OUT, f"the content of message {number}")
    for call in message.get("tool_calls", ()):
        if call["function"]["name"] not in written:
            raise Unusable(LEFT_OUT, f"a tool call of message {number}")


def special_tokens(directory: Path) -> dict[str, str]:
    """The special tokens that templates may use, by name (`bos_token`, ...); from tokenizer_config.json."""
    path = directory / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    contents = {n: v.get("content") if isinstance(v, dict) else v for n, v in named.items()}
    return {name: content for name, content in contents.items() if isinstance(content, str)}
