"""Whether a template has written a message, or left out something of it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from snaketron.data.chats.unusable import LEFT_OUT, Unusable

_WORD = re.compile(r"\w+")


def check_written(message: Mapping[str, Any], written: str, number: int) -> None:
    """Raise `Unusable` when message `number` is not in the text `written` for it.

    The content of an answer must be there whole, and each call. Templates change what others say, for
    example to JSON, so its longest word must be there.
    """
    content = message["content"].strip()
    if message["role"] != "assistant":
        if content not in written:
            word = max(_WORD.findall(content), key=len, default="")
            if word not in written and json.dumps(word)[1:-1] not in written:
                raise Unusable(LEFT_OUT, f"the content of message {number}")
        return
    if content not in written and "</think>" not in content:  # templates take reasoning out of the content
        raise Unusable(LEFT_OUT, f"the content of message {number}")
    calls = message.get("tool_calls", ())
    for name, count in Counter(call["function"]["name"] for call in calls).items() if calls else ():
        if written.count(name) < count:
            raise Unusable(LEFT_OUT, f"a tool call of message {number}")
    if not (content or calls or writes_reasoning(message, written)):
        raise Unusable(LEFT_OUT, f"the reasoning of message {number}, which is all of it")


def writes_reasoning(message: Mapping[str, Any], written: str) -> bool:
    """Whether the reasoning of a message, if it has any, is in the text; white space aside."""
    reasoning = message.get("reasoning_content")
    if not reasoning:
        return True
    return reasoning.strip() in written or "".join(reasoning.split()) in "".join(written.split())
