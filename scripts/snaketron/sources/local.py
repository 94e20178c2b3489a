"""The raw files that a path of the configuration means on this machine, and what lies beside them unread.

Every job lists them: nothing but the standard library.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from snaketron.config import Config, ConfigError
from snaketron.sources.formats import MAX_NAMED, READABLE, suffix_of
from snaketron.sources.lockfile import request
from snaketron.wording import some

SAMPLE = re.compile(r"data/sample/([a-z0-9_]+)/part_\d+\.jsonl")
_DESCRIPTIONS = ("dataset_info.json", "state.json", "dataset_dict.json")  # what `datasets` writes beside data


class Listed(NamedTuple):
    """What a path means."""

    files: list[str]
    unread: list[str]  # what lies in the same place and is no raw file


def list_files(pattern: str, at: str) -> Listed:
    """The files that a file, directory or glob of the key `at` means, by name. Raises `ConfigError`.

    A link to a directory is followed, and each directory read once. A hidden file belongs to a program that
    still downloads or edits it.
    """
    if SAMPLE.fullmatch(pattern):  # it may not have been written yet
        return Listed([pattern], [])
    path = Path(pattern)
    try:
        return _listed(path, pattern, at)
    except OSError as error:  # a name that is too long, or a link to itself
        where = _shown(str(error.filename or pattern))
        raise ConfigError(f"{at}: {where} cannot be read ({error.strerror})") from None


def _listed(path: Path, pattern: str, at: str) -> Listed:
    """The files that `path` means, which is written as `pattern`."""
    if path.is_dir():
        listed = _sorted(_of_directories(path, at))
        where = f"no {READABLE} file in the directory {pattern}"
    elif path.is_file():
        return Listed([str(path)], [])
    elif path.is_symlink() or not _is_pattern(pattern):
        raise ConfigError(f"{at}: {_gone(path)} ({_start()})")
    else:
        listed = _sorted(_matching(path, at))
        where = f"no file matches {pattern}"
    if not listed.files:
        raise ConfigError(f"{at}: {where} ({_start()})")
    return listed


def _start() -> str:
    return f"relative paths start at {Path.cwd()}"


def unread(config: Config) -> list[str]:
    """A line for each path of a source beside whose files something lies that is not read."""
    lines = []
    for where, source in config.sources():
        for j, pattern in enumerate(source.paths if request(source) is None else ()):
            at = f"{where}.paths[{j}]"
            if names := list_files(pattern, at).unread:
                lines.append(f"{at}: not read: {some([_shown(name) for name in names], MAX_NAMED)}")
    return lines


def _shown(name: str) -> str:
    return name if name.isprintable() else repr(name)  # a name that is not UTF-8 cannot be printed


def _sorted(found: Iterator[tuple[str, bool]]) -> Listed:
    """What is read and what is not, of pairs of a path and whether it is read."""
    listed = Listed([], [])
    for path, read in found:
        (listed.files if read else listed.unread).append(path)
    listed.files.sort()
    listed.unread.sort()
    return listed


def _directories(root: Path, at: str, *, hidden: bool) -> Iterator[tuple[Path, list[os.DirEntry[str]]]]:
    """A directory and all below it, each once, with what it holds. Links to directories come last."""
    seen: set[tuple[int, int]] = set()
    waiting, links = [root], list[Path]()
    while waiting or links:
        here = waiting.pop() if waiting else links.pop(0)
        try:
            identity = here.stat()
            if (identity.st_dev, identity.st_ino) in seen:
                continue
            seen.add((identity.st_dev, identity.st_ino))
            with os.scandir(here) as found:
                entries = sorted(found, key=lambda entry: entry.name)
            _check_open(here, at)
        except OSError as error:
            raise ConfigError(f"{at}: {_shown(str(here))} cannot be read ({error.strerror})") from None
        yield here, entries
        for entry in entries:
            if entry.is_dir() and (hidden or not _hidden(entry.name)):
                (links if entry.is_symlink() else waiting).append(here / entry.name)


def _of_directories(root: Path, at: str) -> Iterator[tuple[str, bool]]:
    """Each entry of a directory and of those below it, and whether it is a raw file."""
    for here, entries in _directories(root, at, hidden=False):
        data = _data_set(here, {entry.name for entry in entries}, at)
        prefix = str(here / "_")[:-1]  # a path is ten times as slow to put together
        for entry in entries:
            path = prefix + entry.name
            if entry.is_dir():
                if _hidden(entry.name):
                    yield f"{path}/", False
            elif _hidden(entry.name):
                yield path, False
            elif data is not None:
                if entry.name in data:
                    yield path, True
                elif entry.name not in _DESCRIPTIONS:
                    yield path, False
            else:
                yield path, bool(suffix_of(path)) and (entry.is_file() or _is_raw(Path(path), at))


def _matching(path: Path, at: str) -> Iterator[tuple[str, bool]]:
    """Each path that a glob matches, and whether it is read. `**` follows links to directories."""
    for match in dict.fromkeys(matches(path, at)):
        if _hidden(match.name) and not _hidden(path.name):
            yield f"{match}{'/' * match.is_dir()}", False
        elif match.is_dir():
            yield f"{match}/", False
        elif match.is_file():
            yield str(match), True  # that it was asked for and is of no known format is an error
        else:
            yield str(match), _is_raw(match, at)


def matches(path: Path, at: str) -> Iterator[Path]:
    """Each path that a glob of the key `at` matches, some twice; `ConfigError` where one may not be read."""
    anchor = Path(path.anchor)
    parts = path.relative_to(anchor).parts
    if "**" not in parts:
        yield from _glob(anchor, parts, at)
        return
    first = parts.index("**")
    before, after = parts[:first], parts[first + 1 :] or ("*",)
    for base in _glob(anchor, before, at):
        if base.is_dir():
            for here, _ in _directories(base, at, hidden=True):
                yield from _glob(here, after, at)


def _glob(root: Path, parts: tuple[str, ...], at: str) -> Iterator[Path]:
    """What a glob of these parts matches. pathlib would pass over a directory that may not be read."""
    found = [root]
    for i, part in enumerate(parts):
        for directory in filter(Path.is_dir, found):
            _check_open(directory, at, os.R_OK | os.X_OK if _is_pattern(part) else os.X_OK)
        found = [*root.glob(str(Path(*parts[: i + 1])))]
    yield from found


def _check_open(directory: Path, at: str, mode: int = os.R_OK | os.X_OK) -> None:
    if not os.access(directory, mode):
        raise ConfigError(f"{at}: {_shown(str(directory))} cannot be read ({os.strerror(errno.EACCES)})")


def _is_pattern(text: str) -> bool:
    return any(c in text for c in "*?[")


def _is_raw(path: Path, at: str) -> bool:
    """Whether an entry of a directory is a raw file; `ConfigError` for one that is gone."""
    if not suffix_of(path.name):
        return False
    if not path.exists():
        raise ConfigError(f"{at}: {_gone(path)}; restore the file, or remove the link")
    return path.is_file()


def _gone(path: Path) -> str:
    if path.is_symlink():
        there = "is no file" if path.exists() else "does not exist"
        return f"{_shown(str(path))} is a link to {_shown(str(path.readlink()))}, which {there}"
    if path.exists():
        return f"{_shown(str(path))} is a pipe, a socket or a device; name a file"
    return f"{_shown(str(path))} does not exist"


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _data_set(here: Path, names: set[str], at: str) -> set[str] | None:
    """The data files of a directory that `datasets` wrote, not its caches; None for any other directory."""
    if "dataset_dict.json" in names and (splits := _said(here / "dataset_dict.json", "splits")):
        if len(splits) > 1:
            raise ConfigError(
                f"{at}: {here} is a data set with the splits {', '.join(splits)} (save_to_disk of "
                f"`datasets`); name the one to read: {here / splits[0]}"
            )
        return set()
    if "state.json" in names and (listed := _said(here / "state.json", "_data_files")):
        data = {str(entry["filename"]) for entry in listed if isinstance(entry, dict) and "filename" in entry}
        if missing := data - names:
            raise ConfigError(f"{at}: {here} is a data set whose file {min(missing)} is missing")
        if data:
            return data
    if "dataset_info.json" in names and any(name.endswith(".arrow") for name in names):
        found = {name for name in names if suffix_of(name) and name not in _DESCRIPTIONS}
        return {name for name in found if not name.startswith("cache-")}  # what map and filter made of them
    return None


def _said(path: Path, key: str) -> list[Any]:
    """What a description of `datasets` lists; nothing in a file of another kind."""
    try:
        return list(json.loads(path.read_bytes())[key])
    except (ValueError, KeyError, TypeError):
        return []
