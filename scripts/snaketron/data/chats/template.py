"""Chat templates: from a conversation to text, and the spans of it that the assistant wrote.

A template is rendered once, whole, and the text is tokenized once, whole, so training sees the ids that
`apply_chat_template` gives at inference. The template marks what is trained by
`{% generation %}` and `{% endgeneration %}`. For a template without these marks, `Template` finds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from snaketron.data.chats.asked import Asked
from snaketron.data.chats.conversation import Span
from snaketron.data.chats.environment import compile_source, tojson
from snaketron.data.chats.marks import (
    MARK_IT,
    OWNS,
    Rendered,
    marked_spans,
    owner_mark,
    piece_of,
    pieces_of,
    unmarked,
)
from snaketron.data.chats.messages import ROLES, Message
from snaketron.data.chats.probes import ANSWER, CALL, CALLED, PROBE, RESULT, TOOL, TOOLS, TWO_CALLS
from snaketron.data.chats.prompts import common, is_tag, opens, shared, without
from snaketron.data.chats.unusable import LEFT_OUT, NO_PROMPT, REFUSED, Unusable
from snaketron.data.chats.written import check_written, writes_reasoning
from snaketron.log import UserError

import jinja2

_DAY = date(2026, 1, 1)
_HERE = "\ufdd4 "  # marks the end of a message; the space shows whether the template trims texts


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
        day: date = _DAY,
    ) -> None:
        """Raises `UserError` where the template does not parse, or does not show what is generated.

        Args:
            variables: special tokens (`bos_token`, ...) that some templates use.
            arguments: those of the configuration.
            off_arguments: further ones, for a conversation without reasoning.
            day: told to a template that asks for the date: another day must not give another text.
        """
        self.name = name
        self.arguments = dict(arguments or {})
        self.off_arguments = dict(off_arguments or {})
        made = compile_source(source, name, variables or {}, day)
        self._template, self.marked, self.names = made.template, made.marked, made.names
        self.asked: set[str] = set()  # the keys that the template has asked messages for
        self.opened: set[str] = set()  # what inference puts before an answer, and the text does not
        self._asks = False  # whether only a text that asks for another answer ends the last one
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
        marked = self._write(messages, tools, arguments, self._asks)
        text, pieces = pieces_of(marked)
        rendered = marked_spans(marked) if self.marked else self._found(text, pieces, messages)
        unwritten = []
        for number, message in enumerate(messages):
            written = "".join(part for _, part in pieces.get(number, [])) or text
            check_written(message, written, number)
            calls = message.get("tool_calls", ())
            if len(calls) > 1 and not self.writes_two_calls:
                raise Unusable(LEFT_OUT, f"all calls of message {number} but the first")
            if any(call["function"]["arguments"] for call in calls) and not self.writes_arguments:
                raise Unusable(LEFT_OUT, f"the arguments of the calls of message {number}")
            if not writes_reasoning(message, written):
                unwritten.append(number)
        return rendered._replace(unwritten=tuple(unwritten))

    def _found(
        self,
        text: str,
        pieces: Mapping[int, list[tuple[int, str]]],
        messages: Sequence[Mapping[str, Any]],
    ) -> Rendered:
        """Text and spans, from the output of a template without generation blocks."""
        spans: list[Span] = []
        owners: list[int | None] = []
        for number, message in enumerate(messages):
            if message["role"] not in ("assistant", "tool"):
                continue  # a template may write the others before its loop
            piece = piece_of(pieces, number, self.name)
            if message["role"] == "assistant":
                spans.append(self._span(piece, number, messages))
                owners.append(number)
            if self._asks and number == len(messages) - 1:
                text = text[: piece[0] + len(piece[1])]  # without the prompt for another answer
        return Rendered(text, spans, owners)

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> str:
        """The text that inference gives the model so that it answers `messages`."""
        return unmarked(self._write(messages, tools, arguments, True))

    def begun(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text that inference gives the model so that it goes on with the last message.

        As transformers' `continue_final_message` writes it.
        """
        *before, last = messages
        written = self._write([*before, {**last, "content": last["content"] + _HERE}], None, None, False)
        text, found, after = unmarked(written).rpartition(_HERE.strip())
        if not found:
            raise Unusable(LEFT_OUT, "the message that an answer goes on with")
        return text if after.startswith(" ") else text.rstrip()

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
            RecursionError,
            LookupError,
            AttributeError,
        ) as error:
            raise Unusable(REFUSED, str(error)) from None

    # ------------------------------------------------------------------ what the template can do

    def _message(self, message: Mapping[str, Any]) -> Message:
        """The message in the form that the template takes."""
        given = Asked(message, self.asked)
        if given["role"] == "developer" and "developer" not in self.roles:
            given["role"] = "system"
        if given["role"] not in self.roles:
            raise Unusable(LEFT_OUT, f"it writes none by {given['role']!r}")
        if (reasoning := given.get("reasoning_content")) is not None:
            given.setdefault("thinking", reasoning)  # some templates read this name, transformers gives both
        if given.get("tool_calls") and self.arguments_as_text:
            given["tool_calls"] = [
                {**call, "function": call["function"] | {"arguments": tojson(call["function"]["arguments"])}}
                for call in given["tool_calls"]
            ]
        return given

    @cached_property
    def roles(self) -> set[str]:
        """The roles whose messages the template writes; it leaves out those of other roles in silence."""
        self.__dict__["roles"] = set(ROLES)  # while they are tried
        tried = {role: [{"role": role, "content": RESULT}, *PROBE] for role in ("system", "developer")}
        tried["tool"] = [*CALLED, PROBE[1]]
        return {"user", "assistant"} | {role for role, chat in tried.items() if self._writes(chat, RESULT)}

    @cached_property
    def writes_reasoning(self) -> bool:
        """Whether the template writes the reasoning of an answer, or of a call."""
        thought = {"reasoning_content": RESULT}
        return any(self._writes([chat[0], chat[1] | thought], RESULT) for chat in (PROBE, CALL))

    @cached_property
    def writes_tools(self) -> bool:
        """Whether the template writes the tools of a conversation."""
        return self._writes(PROBE, TOOL)

    @cached_property
    def writes_arguments(self) -> bool:
        return self._writes(CALL, "Oslo")

    @cached_property
    def writes_two_calls(self) -> bool:
        return self._writes(TWO_CALLS, "Oslo", "Bergen")

    @cached_property
    def arguments_as_text(self) -> bool:
        """Whether the template takes the arguments of a call as JSON text only; most take the object."""
        self.__dict__["arguments_as_text"] = False  # while it is tried
        if self._writes(CALL, "Oslo") and not self._writes(CALL, "{'city': 'Oslo'}"):
            return False
        self.__dict__["arguments_as_text"] = True
        return self._writes(CALL, '"Oslo"')

    def _writes(self, messages: Sequence[Message], *texts: str) -> bool:
        for tools in (None, TOOLS):
            try:
                written = self._write(messages, tools, None, False)
            except Unusable:
                continue
            if all(text in written for text in texts):
                return True
        return False

    def probes(self) -> Iterator[tuple[list[Message], list[Any] | None, Mapping[str, Any]]]:
        """Messages before an answer, tools and arguments that the template takes; most take no tools, too."""
        for before in ([PROBE[0]], [*PROBE, PROBE[0]], CALLED):
            for arguments in ({}, self.off_arguments):
                for tools in (None, TOOLS):
                    try:
                        self._write([*before, PROBE[1]], tools, arguments, False)
                    except Unusable as error:
                        problem = error
                        continue
                    yield before, tools, arguments
                    break
                else:
                    if len(before) == 1 and not arguments:
                        raise self._no_answer(problem) from None

    def _no_answer(self, problem: Unusable) -> UserError:
        """The error for a template that cannot render even a question and its answer."""
        fix = f"; {MARK_IT}" if problem.reason == LEFT_OUT else ""
        return UserError(f"{self.name}: cannot render a question and an answer: {problem}{fix}")

    # ----------------------------------------------------------- templates that mark what is generated

    def check_marks(self) -> None:
        """Raise `UserError` when the marks enclose what inference gives the model, such as a role header."""
        for before, tools, arguments in self.probes():
            made = marked_spans(self._write([*before, PROBE[1]], tools, arguments, False))
            own = [span for span, owner in zip(made.spans, made.owners, strict=True) if owner == len(before)]
            if not own and len(before) > 1:
                continue  # whose each block is is not known
            start = (own or made.spans or [(len(made.text), 0)])[0][0]
            try:
                given = self.prompt(before, tools, arguments)
            except Unusable:
                continue  # it takes no conversation without an answer
            trained = made.text[start : shared(made.text, given)]
            if trained.strip() and not opens(trained):
                raise UserError(
                    f"{self.name}: {trained!r} lies in the generation block of an answer, but inference "
                    "gives it to the model before the answer; begin the block after it"
                )

    # ------------------------------------------------- templates that do not mark what is generated

    def _probe(self) -> None:
        """Find the prompts of an answer after a user's message, and after a tool's result."""
        self._prompts: dict[str, set[str]] = {"user": set(), "tool": set()}
        self._headers: set[str] = set()  # stand before answers that no prompt fits, as in a shortened history
        for before, tools, arguments in self.probes():
            try:
                self._try(before, tools, arguments)
            except Unusable as error:
                if len(before) == 1 and not arguments:
                    raise self._no_answer(error) from None
        self._prompts["tool"] = self._prompts["tool"] or self._prompts["user"]

    def _try(self, before: list[Message], tools: list[Any] | None, arguments: Mapping[str, Any]) -> None:
        text, pieces = pieces_of(self._write([*before, PROBE[1]], tools, arguments, self._asks))
        for number, message in enumerate([*before, PROBE[1]]):
            if message is not PROBE[1]:
                continue
            start, written = piece_of(pieces, number, self.name)
            header, found, rest = written.partition(ANSWER)
            if found and not rest.strip() and not self._asks:
                self._asks = True
                return self._try(before, tools, arguments)
            if not found or not rest.strip():
                what = (
                    "ends the assistant's turn with nothing" if found else "changes what the assistant says"
                )
                raise UserError(
                    f"{self.name}: the chat template has no generation blocks, and {what}; {MARK_IT}"
                )
            self._headers.add(header)
            prompt = self.prompt(before, tools, arguments)
            if number == len(before) and prompt.startswith(text[:start]):
                self._prompts[before[-1]["role"]].add(prompt[start:])

    def _span(self, piece: tuple[int, str], number: int, messages: Sequence[Mapping[str, Any]]) -> Span:
        """What the assistant wrote of a piece: that after the prompt, or what the prompt shares with it."""
        start, written = piece
        after = messages[number - 1]["role"] if number else ""
        prompts = self._prompts["tool" if after == "tool" else "user"]
        fitting = [len(prompt) for prompt in prompts if written.startswith(prompt)]
        if not fitting:
            lengths = [(shared(written, prompt), prompt) for prompt in prompts]
            fitting = [length for length, prompt in lengths if length and opens(prompt[length:])]
        fitting = fitting or [len(header) for header in self._headers if written.startswith(header)]
        begin, end = start + max(fitting, default=len(written)), start + len(written.rstrip())
        if begin >= end:
            raise Unusable(NO_PROMPT, f"message {number} is written as {written[:60]!r}")
        for header in filter(is_tag, (header.strip() for header in prompts | self._headers)):
            # Some templates do so after a call. At its beginning an answer may write a header itself.
            if header in written[begin - start :].lstrip()[1:]:
                raise Unusable(NO_PROMPT, f"message {number} holds {header!r} a second time")
        return begin, end

    def check(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        arguments: Mapping[str, Any] | None,
        rendered: Rendered,
    ) -> None:
        """Raise `UserError` where inference would not be given the text that stands before an answer.

        Compared are the first two answers and the last one of the last turn. A template with generation
        blocks may write the history in another way at inference; but what stands between the prompt and the
        block of an answer would neither be trained nor given.
        """
        last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        asked = {
            owner: start
            for (start, _), owner in reversed(list(zip(rendered.spans, rendered.owners, strict=True)))
            if owner and owner > last and messages[owner - 1]["role"] != "assistant"
        }
        owners = sorted(asked)
        for owner in dict.fromkeys([*owners[:2], *owners[-1:]]):  # a turn may have hundreds of calls
            before = rendered.text[: asked[owner]]
            try:
                given = self.prompt(messages[:owner], tools, arguments)
            except Unusable:
                if self.marked:
                    continue
                raise
            if before == given or self._agrees(before, given, rendered.text, messages[owner - 1]["role"]):
                continue
            at = max(0, common(before, given) - 20)
            raise UserError(
                f"{self.name}: message {owner} of a conversation is not written as inference asks for it: "
                f"before it stands {before[at : at + 60]!r}, but inference gives the model "
                f"{given[at : at + 60]!r}; set template_arguments so that they agree, or {MARK_IT}"
            )

    def _agrees(self, before: str, given: str, text: str, after: str) -> bool:
        """Whether the text before an answer may differ from what inference is given."""
        if self.marked:
            gap = before[len(given) :] if before.startswith(given) else ""
            return not gap.strip() or "add_generation_prompt" not in self.names or opens(gap)
        known = self._prompts["tool" if after == "tool" else "user"]
        if without(before, known) & without(given, known):
            return True  # they differ in the prompt only, as with and without reasoning
        tail = given[len(before) :] if given.startswith(before) else ""
        if not opens(tail) or text.startswith(tail.strip(), len(before)):
            return False
        self.opened.add(tail)
        return True


def load_template(path: Path, variables: Mapping[str, str] | None = None, **arguments: Any) -> Template:
    """Compile the chat template of a file; the other arguments are those of `Template`."""
    source = read_source(path, "rule install_chat_template")
    return Template(source, name=str(path), variables=variables, **arguments)


def read_source(path: Path, origin: str) -> str:
    """The text of a file; where it is not there, `UserError` names the rule or the key it comes from."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such chat template ({origin})") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: invalid UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from None
