"""Why a conversation cannot be used, and what to do about it."""

from __future__ import annotations

NO_ROLE = "a message without a role"
DOUBLED = "a key that stands twice"
NOT_UNICODE = "not Unicode text"
THOUGHTS = "thinking that cannot be told from the answer"
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
    NO_ROLE: "name its keys in role_key and content_key of the source (from, value: ShareGPT)",
    "unknown role": "rename it, or name it in `roles` of the source: {human: user, gpt: assistant}",
    "two system messages": "remove one, or set system_field of the source to null",
    "content that is not text": "give text, or a list of text parts; images are not trained",
    "malformed tool call": 'give {"function": {"name": ..., "arguments": {...}}}',
    DOUBLED: "remove one of them, because only one can be read",
    "an empty answer": "remove the message, or the row",
    "a weight that is neither 0 nor 1": "give 0 for an answer that is not trained, else 1",
    THOUGHTS: "give it in reasoning_content, or set thinking_tags of the source to null",
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
