"""What settings leave out of their JSON: keys that were added later, where they have their default.

So a new key makes nothing again, and who compares settings has to know what is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from snaketron.config import Section
from snaketron.settings.chats import PackSettings, RenderSettings
from snaketron.settings.text import TokenizeSettings

from pydantic_core import to_jsonable_python

# By the rule that is told them, and by the kind of the record that holds them.
_KINDS: dict[str, type[Section]] = {
    "tokenize_shard": TokenizeSettings,
    "tokens": TokenizeSettings,
    "render_chat": RenderSettings,
    "pack_sft": PackSettings,
}


def value_of(settings: Mapping[str, Any], key: str, kind: str, none: Any) -> Any:
    """The value of a key in settings of a kind; `none` where they have none and leave none out.

    >>> [value_of({"source": "docs"}, key, "render_chat", "nothing") for key in ("template_date", "color")]
    ['2026-01-01', 'nothing']
    """
    if key in settings:
        return settings[key]
    if key == "data_seed":  # the seed of a phase, where that has none of its own
        return settings.get("seed", none)
    field = _KINDS[kind].model_fields.get(key) if kind in _KINDS else None
    return to_jsonable_python(field.default) if field and field.exclude_if else none
