"""Writes config/config.yaml and config/schema.json from the classes: `python -m snaketron.config.write`."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from snaketron.config import Config
from snaketron.files import write_text

import yaml
from pydantic import BaseModel


def as_yaml() -> str:
    """The text of config/config.yaml: every key with its default and its description."""
    lines = [
        "# Every key with its default, generated from scripts/snaketron/config/. Change values in a",
        "# file of your own and name it with --configfile: it is merged over this one, lists replace lists.",
        "# yaml-language-server: $schema=schema.json",
    ]
    _section(Config(), 0, lines)
    return "\n".join(lines) + "\n"


def _section(section: BaseModel, depth: int, lines: list[str]) -> None:
    indent = "  " * depth
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if depth == 0:
            lines.append("")
        lines += textwrap.wrap(
            field.description or "", 105, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}#   "
        )
        if isinstance(value, BaseModel):
            lines.append(f"{indent}{name}:")
            _section(value, depth + 1, lines)
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            lines += [f"{indent}#   {k}: {f.description}" for k, f in type(value[0]).model_fields.items()]
            lines.append(
                f"{indent}{name}:{_value([v.model_dump(exclude_unset=True) for v in value], indent)}"
            )
        else:
            lines.append(f"{indent}{name}:{_value(value, indent)}")


def _value(value: Any, indent: str) -> str:
    """YAML of a value: on the line of its key when it fits, else as a block below it."""
    line = yaml.safe_dump(value, default_flow_style=True, width=1000, sort_keys=False)
    line = line.removesuffix("\n").removesuffix("\n...")
    if len(line) < 80 or not isinstance(value, list | dict):
        return f" {line}"
    block = yaml.safe_dump(value, default_flow_style=None, width=100, sort_keys=False).rstrip()
    return "\n" + textwrap.indent(block, indent + "  ")


def as_schema() -> str:
    """The text of config/schema.json: completion and checks in an editor."""
    return json.dumps(Config.model_json_schema(), indent=2) + "\n"


def main() -> None:
    directory = Path(__file__).parents[3] / "config"
    write_text(directory / "config.yaml", as_yaml())
    write_text(directory / "schema.json", as_schema())


if __name__ == "__main__":
    main()
