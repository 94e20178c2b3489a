"""A conversation with a model: its template writes the prompts, a decoder answers them and remembers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from snaketron.data.chats.conversation import control_tokens
from snaketron.data.chats.template import Template
from snaketron.data.chats.unusable import Unusable
from snaketron.inference.decoder import Decoder
from snaketron.inference.generate import Sampling, continuation, finish_reason
from snaketron.inference.pieces import Pieces
from snaketron.log import UserError
from snaketron.wording import plural

from tokenizers import Tokenizer

# A call as JSON, or as the templates of Nemotron 3 and Qwen3-Coder write it.
_CALL = re.compile(r'<tool_call>\s*(?:{\s*"name":\s*"|<function=)([^">]*)')
_THOUGHT = re.compile(r"\A\s*(?:<think>)?(.*?)</think>(.*)\Z", re.DOTALL)


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


@dataclass(kw_only=True)
class Chat:
    """What was said so far. The decoder has one row.

    stop: ids that end an answer.
    system: the first message, if not empty.
    tools: JSON schemas of the functions that the model may call.
    arguments: of the template, such as {"enable_thinking": true}.
    """

    decoder: Decoder
    template: Template
    tokenizer: Tokenizer
    stop: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    system: str = ""
    tools: Sequence[Any] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    messages: list[dict[str, Any]] = field(init=False)
    cut: str = field(init=False, default="")  # why the last answer has no end; empty where it has one
    _known: list[int] = field(init=False, default_factory=list)  # what the decoder has read
    _opened: bool = field(init=False, default=False)  # whether the last prompt has opened the thinking

    def __post_init__(self) -> None:
        self._control = control_tokens(self.tokenizer)
        self._check(self.system, json.dumps(list(self.tools), ensure_ascii=False))
        self.reset()

    def reset(self) -> None:
        """Forget all but the system's message."""
        self.messages = [_message("system", self.system)] if self.system else []

    @property
    def calls(self) -> list[str]:
        """The names of the functions that the last message calls."""
        return _CALL.findall(self.messages[-1]["content"]) if self.messages else []

    def thinks(self, answer: str) -> bool:
        """Whether the last answer, as far as it is here, is still thinking."""
        return "</think>" not in answer and (self._opened or answer.lstrip().startswith("<think>"))

    def say(self, *texts: str, role: str = "user") -> Iterator[str]:
        """Add messages, and give the answer in the pieces in which it comes.

        What was said is kept when the caller stops in the middle of an answer. Raises `UserError`, and keeps
        nothing, when a text holds a control token, the template refuses it, or the conversation has become
        too long.
        """
        self._check(*texts)
        messages = [*self.messages, *(_message(role, text) for text in texts)]
        try:
            prompt = self.template.prompt(messages, list(self.tools) or None, self.arguments)
        except Unusable as error:
            raise UserError(f"the chat template cannot write this conversation: {error}") from None
        ids = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        if len(ids) >= self.decoder.max_length:
            raise UserError(
                f"the conversation has {len(ids):,} tokens, and the model was trained on up to "
                f"{self.decoder.max_length:,}; begin another one (/reset), or say less"
            )
        self.messages, self._opened = messages, prompt.rstrip().endswith("<think>")
        answer = ""
        try:
            for piece in self._pieces(ids):
                answer += piece
                yield piece
        finally:
            self.messages.append(self._answer(answer, thinking=self._opened))

    def _check(self, *texts: str) -> None:
        for text in texts:
            if self._control and (found := self._control.search(text)):
                raise UserError(
                    f"{found.group()} is a control token of this tokenizer; write it in another way"
                )
            if lone := re.search("[\ud800-\udfff]", text):
                raise UserError(f"the text is not valid UTF-8, at character {lone.start() + 1}")

    def _pieces(self, ids: list[int]) -> Iterator[str]:
        self.cut = ""
        known, self._known = self._known, []  # until the decoder has read them: it may be interrupted
        if not known or ids[: len(known)] != known or len(ids) == len(known):
            self.decoder.forget(0)
            known = []
        unread, known = ids[len(known) :], list(ids)
        answer = Pieces(self.tokenizer)
        before: list[int] = []
        tokens = continuation(
            self.decoder, unread, stop=self.stop, max_tokens=self.max_tokens, sampling=self.sampling
        )
        for token in tokens:
            known += before
            before = [token]
            if token not in self.stop and (piece := answer.add(token)):
                self._known = known
                yield piece
                self._known = []
        self._known = known
        if rest := answer.rest():
            yield rest
        if finish_reason(before, self.stop) == "length":
            said = len(known) + len(before) - len(ids)
            most = f"the model was trained on {self.decoder.max_length:,} with the conversation"
            limit = "--max-tokens" if said == self.max_tokens else most
            self.cut = f"cut after {plural(said, 'token')} ({limit})"

    @staticmethod
    def _answer(text: str, *, thinking: bool) -> dict[str, Any]:
        """The message of an answer; what it thought is apart, so that the template may leave it out later."""
        found = _THOUGHT.match(text) if thinking or text.lstrip().startswith("<think>") else None
        if not found:
            return _message("assistant", text)
        thought, rest = found.groups()
        return _message("assistant", rest.strip()) | {"reasoning_content": thought.strip()}
