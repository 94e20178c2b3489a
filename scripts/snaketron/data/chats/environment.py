"""The jinja2 environment of chat templates: what transformers gives them, with a date that stays the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime, time
from pathlib import Path
from typing import Any

from snaketron.data.chats.asked import dict_of
from snaketron.data.chats.marks import Generation, show_owners
from snaketron.files import read_json
from snaketron.log import UserError

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox


@dataclass(frozen=True)
class Compiled:
    """A template, whether it marks what is generated, and the variables that it asks for."""

    template: jinja2.Template
    marked: bool
    names: set[str]


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def tojson(
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


def compile_source(source: str, name: str, variables: Mapping[str, str], day: date) -> Compiled:
    """Compile a template that is called `name`; `UserError` when it does not parse.

    `strftime_now` tells it the beginning of `day`.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["dict"] = dict_of
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = datetime.combine(day, time()).strftime
    try:
        parsed = environment.parse(source)
        names = jinja2.meta.find_undeclared_variables(parsed)
        parsed.body = show_owners(parsed.body)
        parsed.set_environment(environment)
        code = environment.compile(parsed)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{name}:{error.lineno}: the chat template does not parse: {error.message}") from None
    made = jinja2.Template.from_code(environment, code, environment.make_globals(dict(variables)))
    return Compiled(made, environment.num_generation_blocks > 0, names)  # type: ignore[attr-defined]


def special_tokens(directory: Path) -> dict[str, str]:
    """The special tokens that templates may use, by name (`bos_token`, ...); from tokenizer_config.json."""
    path = directory / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    extra = config.get("extra_special_tokens")
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    named = (extra if isinstance(extra, dict) else {}) | named
    contents = {n: v.get("content") if isinstance(v, dict) else v for n, v in named.items()}
    return {name: content for name, content in contents.items() if isinstance(content, str)}
