"""From a row of a raw file to a conversation, as the settings of its source say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from snaketron.data.chats.conversation import Conversation, conversation
from snaketron.data.chats.messages import Form, of_arrow
from snaketron.data.chats.unusable import Unusable
from snaketron.data.drops import ARROW, INVALID_TEXT, Bad, Drops
from snaketron.data.json_rows import replaced
from snaketron.settings.chats import RenderSettings
from snaketron.sources.formats import suffix_of

_FUNCTIONS = "functions"  # OpenAI's older name of `tools`
_UNREAD = (  # fields that say something to the model, and are not given to templates
    *("chat_template_kwargs", "documents", "system_prompt", "system_message"),
)
_WEIGHTS = ("weight", "train")  # read in messages, and not in rows


def optional_fields(settings: RenderSettings) -> list[str]:
    """The fields of a row that are read if it has them."""
    known = (settings.tools_field, settings.system_field, _FUNCTIONS, *_UNREAD, *_WEIGHTS)
    return [name for name in known if name]


def read_conversation(
    row: Mapping[str, Any], path: Path, settings: RenderSettings, drops: Drops
) -> Conversation:
    """The conversation of a row of the file `path`; `Unusable` or `Bad` when there is none."""
    _check_field(row, settings.messages_field)
    system = row.get(settings.system_field) if settings.system_field else None
    values = [row[settings.messages_field], row.get(settings.tools_field), system, row.get(_FUNCTIONS)]
    if suffix_of(path.name) in ARROW:
        values = [of_arrow(value) for value in values]
    messages, tools, system, functions = values
    tags = settings.thinking_tags
    form = Form(settings.role_key, settings.content_key, settings.roles, (tags[0], tags[1]) if tags else None)
    found = conversation(messages, tools, system=system, functions=functions, form=form)
    unread = {name for name in _UNREAD if name != settings.system_field and row.get(name)}
    chosen = {*settings.where, *settings.metadata_fields}
    unread |= {name for name in _WEIGHTS if name not in chosen and row.get(name) not in (None, 1)}
    if unread:
        found = replace(found, unread=found.unread | {f"{name} of the row" for name in unread})
    try:
        found.json  # noqa: B018 (text that is JSON may hold lone surrogates where the file has none)
    except Unusable as error:
        if settings.invalid_text != "replace":
            raise Bad(error.detail, "correct the text", INVALID_TEXT) from None
        found = replace(found, messages=replaced(found.messages), tools=replaced(found.tools))
        drops.num_replaced += 1
    return found


def _check_field(row: Mapping[str, Any], messages_field: str) -> None:
    """Raise `Bad` when the field holds no messages; then `messages_field` is mostly wrong."""
    messages = row[messages_field]
    if messages is None or isinstance(messages, list):
        return
    if isinstance(messages, str) and messages.lstrip().startswith("["):
        return  # JSON text
    fields = ", ".join(repr(name) for name in row)
    raise Bad(
        f"field {messages_field!r} holds a {type(messages).__name__}, not a list of messages; "
        f"the fields are {fields}",
        "set messages_field of this source to the right one",
    )
