"""Keys that stand twice in YAML: readers take the last one, and what was written under the first is lost."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from snaketron.config.base import ConfigError

import yaml

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C: 30 times as fast


def check_doubled(
    files: Iterable[str | Path],
    arguments: Iterable[str] = (),
    command: Sequence[str] = (),
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Raise `ConfigError` with the lines of all keys that stand twice in one mapping.

    Looked at are configuration files, the `--config` arguments KEY=VALUE, and the profiles that the `command`
    or the `environment` names.
    """
    problems: list[str] = []
    for file in [*files, *_profiles(command, environment)]:
        problems += _of_file(Path(file))
    seen: set[str] = set()
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in seen:
            problems.append(f"--config: {name} is given twice; join them")
        seen.add(name)
        problems += doubled(value, f"--config {name}", lines=False)
    if problems:
        raise ConfigError("\n".join(problems))


def _of_file(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []  # whoever reads it will say so
    return doubled(text, str(path))


def doubled(text: str, where: str, *, lines: bool = True) -> list[str]:
    """The keys that stand twice in a mapping of YAML, with their lines; none in text that is no YAML."""
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError:
        return []  # whoever reads it will say so
    found = _doubled(root, "") if root else ()
    return [
        f"{where}: {key} stands there twice{f', in lines {first} and {second}' if lines else ''}; join them"
        for key, first, second in found
    ]


def _doubled(node: yaml.Node, at: str) -> Iterator[tuple[str, int, int]]:
    """The path of each doubled key below a node, and its first two lines."""
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            yield from _doubled(item, f"{at}[{i}]")
    elif isinstance(node, yaml.MappingNode):
        first: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            path = f"{at}.{name}".lstrip(".")
            if name in first:
                yield path, first[name], line
            first.setdefault(name, line)
            yield from _doubled(value, path)


def _profiles(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[Path]:
    """The files of the profiles that Snakemake was started with."""
    named = [environment["SNAKEMAKE_PROFILE"]] if environment.get("SNAKEMAKE_PROFILE") else []
    for i, word in enumerate(command):
        option, given, value = word.partition("=")
        if option in ("--profile", "--workflow-profile"):
            named += [value] if given else command[i + 1 : i + 2]
    for profile in named:
        if (path := Path(profile) / "config.yaml").is_file():
            yield path
