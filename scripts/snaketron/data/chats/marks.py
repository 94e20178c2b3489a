"""Marks in the text that a chat template writes: what is generated, and which message is being written.

The marks are characters that no text holds; they are taken out after rendering. They stay right when a block
lies in a macro or in `{% set %}`; the offsets that transformers counts do not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from snaketron.data.chats.conversation import NONCHARACTERS, Span
from snaketron.data.chats.unusable import LEFT_OUT, REFUSED, Unusable
from snaketron.log import UserError

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser

_START, _END, _OWNER, _OWNER_END = NONCHARACTERS
_MARKS = re.compile(f"({_START}|{_END}|{_OWNER}[0-9:]*{_OWNER_END})")
OWNS = "_snaketron_owns"  # the variable of a template that writes owner marks

MARK_IT = (
    "put what the assistant writes, with the token that ends its turn, between {% generation %} and "
    "{% endgeneration %}"
)


class Rendered(NamedTuple):
    """A text, the spans that the assistant wrote, and the message of each span (None: not known).

    The reasoning of the messages `unwritten` is not in the text.
    """

    text: str
    spans: list[Span]
    owners: list[int | None]
    unwritten: tuple[int, ...] = ()


class Generation(jinja2.ext.Extension):
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


def show_owners(body: list[nodes.Node], depth: int = 0) -> list[nodes.Node]:
    """The statements of a template, and new ones that mark which message a loop is at.

    Marks are added only where output goes straight into the text. The template cannot see them, so the text
    without the marks stays the same.
    """
    shown: list[nodes.Node] = []
    for node in body:
        shown.append(node)
        if isinstance(node, nodes.If):
            for branch in (node, *node.elif_):
                branch.body = show_owners(branch.body, depth)
            node.else_ = show_owners(node.else_, depth)
        elif isinstance(node, nodes.With | nodes.Scope):
            node.body = show_owners(node.body, depth)
        elif isinstance(node, nodes.For) and node.find(nodes.Output) and not node.recursive:
            node.body = show_owners(node.body, depth + 1)
            if isinstance(node.target, nodes.Name):
                target = _message(node)
                call = nodes.Call(nodes.Name(OWNS, "load"), [target, nodes.Const(depth)], [], None, None)
                node.body.insert(0, nodes.Output([call]))
                shown.append(nodes.Output([nodes.TemplateData(f"{_OWNER}{depth}{_OWNER_END}")]))
    return shown


def _message(loop: nodes.For) -> nodes.Expr:
    """What a loop is at: its variable, or `messages[i]` in a loop over `i in range(...)`."""
    assert isinstance(loop.target, nodes.Name)
    called = loop.iter.node if isinstance(loop.iter, nodes.Call) else None
    if isinstance(called, nodes.Name) and called.name == "range":
        made = {name.name for name in loop.find_all(nodes.Name) if name.ctx == "store"}
        for item in loop.find_all(nodes.Getitem):
            of, index = item.node, item.arg
            if not (isinstance(of, nodes.Name) and isinstance(index, nodes.Name)):
                continue
            if index.name == loop.target.name and of.name not in made:
                return nodes.Getitem(nodes.Name(of.name, "load"), nodes.Name(index.name, "load"), "load")
    return nodes.Name(loop.target.name, "load")


def owner_mark(depth: int, number: int) -> str:
    """The mark of message `number`, written by a loop that lies inside of `depth` others."""
    return f"{_OWNER}{depth}:{number}{_OWNER_END}"


def unmarked(text: str) -> str:
    return _MARKS.sub("", text)


def marked_spans(marked: str) -> Rendered:
    """Text and spans, from the output of a template with generation blocks."""
    text: list[str] = []
    spans: list[Span] = []
    owners: list[int | None] = []
    start, position, path = None, 0, _Path()
    for part in _MARKS.split(marked):
        if part == _START and start is None:
            start = position
        elif part == _END and start is not None:
            spans.append((start, position))
            owners.append(path.owner)
            start = None
        elif part in (_START, _END):
            raise Unusable(REFUSED, "a generation block lies in another one")
        elif part.startswith(_OWNER):
            path.move(part)
        else:
            text.append(part)
            position += len(part)
    return Rendered("".join(text), spans, owners)


class _Path:
    """Follows the marks, and knows the message that the innermost loop is at."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}

    def move(self, mark: str) -> None:
        depth, _, number = mark[1:-1].partition(":")
        self._numbers = {d: n for d, n in self._numbers.items() if d < int(depth)}
        if number:
            self._numbers[int(depth)] = int(number)

    @property
    def owner(self) -> int | None:
        return self._numbers[max(self._numbers)] if self._numbers else None


def pieces_of(marked: str) -> tuple[str, dict[int, list[tuple[int, str]]]]:
    """The text, and by message its pieces, from the output of a template.

    A piece is a position in the text and what was written there while the loop was at the message.
    """
    text: list[str] = []
    pieces: dict[int, list[tuple[int, str]]] = {}
    position, path = 0, _Path()
    for part in _MARKS.split(marked):
        if part.startswith(_OWNER):
            path.move(part)
        elif part and part not in (_START, _END):
            if (owner := path.owner) is not None:
                pieces.setdefault(owner, []).append((position, part))
            text.append(part)
            position += len(part)
    return "".join(text), pieces


def piece_of(pieces: Mapping[int, list[tuple[int, str]]], number: int, name: str) -> tuple[int, str]:
    """The position of a message in the text, and all that was written for it."""
    parts = pieces.get(number, [])
    written = "".join(part for _, part in parts)
    if not written:
        raise Unusable(LEFT_OUT, f"message {number}, or writes it within another one")
    (first, _), (last, end) = parts[0], parts[-1]
    if last + len(end) - first != len(written):
        raise UserError(
            f"{name}: cannot tell what the assistant writes: other messages stand within message {number}; "
            + MARK_IT
        )
    return first, written
