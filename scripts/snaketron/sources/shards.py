"""Which raw files there are: listed from disk, or, where they lie elsewhere, from the lock file.

Every job lists them: nothing but the standard library, and nothing that asks the network.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from pathlib import Path
from typing import NamedTuple

from snaketron.config import ChatSource, Config, ConfigError, Corpus
from snaketron.config.names import repeats, unusable
from snaketron.sources import registered
from snaketron.sources.formats import READABLE, suffix_of, without_suffix
from snaketron.sources.local import SAMPLE, list_files
from snaketron.sources.lockfile import Lock, LockedFile, check_addresses, remote, request
from snaketron.sources.models import hub_repositories
from snaketron.wording import plural, size_text

type Shards = dict[str, dict[str, list[str]]]  # of each source, by its name, what `shards` returns

_LONGEST_NAME = 238  # bytes: a file system takes 255, and the job writes .NAME.parquet.partial


class _File(NamedTuple):
    """A raw file."""

    path: str
    size: int | None = None  # bytes; None for a file of this machine, which is asked for it if need be
    later: bool = False  # an earlier file has its name, so it comes after the files that have one


def shards(
    source: Corpus | ChatSource, where: str, lock: Lock, shard_size: int | None = None
) -> dict[str, list[str]]:
    """Map each shard's name to its raw files, in the order in which they are read.

    A shard is called after its first file, without path and suffix; where another file of the source has that
    name already, with the names of directories before it. With `shard_size`, files are put
    together by name until a shard has so many bytes. A limited source has one shard, `sample`: all its
    files in the order of the configuration. Files after the first `max_files` are left out.
    A file of the sample may not exist yet; anything else must. Raises `ConfigError`.
    What was made elsewhere has a shard for each pair or file, `<split>.<name>`; `registered.check` looks at
    it.
    """
    if source.registered:
        return _registered(source, where)
    files = _remote(source, where, lock) if request(source) else _local(source, where)
    files = dict(itertools.islice(files.items(), source.max_files))
    if source.limited:
        return {"sample": [file.path for file in files.values()]}
    found: dict[str, list[str]] = {}
    room = 0  # bytes that the shard of the last file may still take
    # Later files of a name come last, so that they regroup nothing that was made before they were there.
    for name, (path, size, _) in sorted(files.items(), key=lambda item: (item[1].later, item[0])):
        if shard_size and size is None and not SAMPLE.fullmatch(path):
            size = Path(path).stat().st_size
        if room > 0 and size is not None:
            found[next(reversed(found))].append(path)
            room -= size
        else:
            found[name] = [path]
            room = shard_size - size if shard_size and size is not None else 0
    return found


def all_shards(config: Config, lock: Lock) -> tuple[Shards, Shards, dict[str, ConfigError]]:
    """The shards of all corpora, those of all sources of conversations, and what is wrong with the others.

    These are named by their keys, such as corpora[0].
    """
    text: Shards = {}
    chats: Shards = {}
    wrong: dict[str, ConfigError] = {}
    for where, source in config.sources():
        found = text if isinstance(source, Corpus) else chats
        try:
            found[source.name] = shards(source, where, lock, config.data_of(source).shard_size)
        except ConfigError as error:
            wrong[where] = error
    return text, chats, wrong


def _registered(source: Corpus | ChatSource, where: str) -> dict[str, list[str]]:
    """Map the shard name of each pair of tokens, or file of packs, that was made elsewhere to its files."""
    found: dict[str, list[str]] = {}
    for split, at, path in registered.listed(source, where):
        files = registered.files(source, path)
        if problem := unusable(path):
            raise ConfigError(f"{at}: {problem}")
        name = _plain(f"{split}.{without_suffix(Path(path).name)}")
        if name in found or not _fits(name):
            name = _with_hash(name, path)
        found[name] = [str(Path(file).absolute()) if file.startswith("-") else file for file in files]
    return found


def _remote(source: Corpus | ChatSource, where: str, lock: Lock) -> dict[str, _File]:
    """Map the shard name of each file that lies elsewhere to where it is downloaded to, and its size."""
    check_addresses(source, where)
    lock.check(source, where)
    found: dict[str, _File] = {}
    for name, file in lock.files(source.name).items():
        shard, path = name.split(".")[0], f"<data>/raw/{source.name}/{name}"
        if shard in found:
            other = Path(found[shard].path).name
            raise ConfigError(
                f"{where}: in {lock.path}, {name} and {other} would both be shard {shard!r}; list them again"
            )
        found[shard] = _File(path, file.size)
    return found


def _local(source: Corpus | ChatSource, where: str) -> dict[str, _File]:
    """Map the shard name of each file of this machine to the file."""
    paths: dict[str, str] = {}  # to the key that named each
    problems: list[str] = []
    for i, pattern in enumerate(source.paths):
        at = f"{where}.paths[{i}]"
        try:
            files = list_files(pattern, at).files
        except ConfigError as error:
            problems.append(str(error))
            continue
        for path in files:
            if problem := unusable(path):
                raise ConfigError(f"{at}: {problem}")
            if path.startswith("-"):  # programs would take it for an option
                path = str(Path(path).absolute())
            paths.setdefault(path, at)
    if problems:
        raise ConfigError("\n".join(problems))
    names = {path: _shard_name(path, at) for path, at in paths.items()}
    first: dict[str, str] = {}  # the file that a shard is called after
    for path, name in names.items():
        first.setdefault(name, path)
    taken = set(first)
    found: dict[str, _File] = {}
    for path, name in names.items():
        other = first[name]
        if path == other:
            found[name] = _File(path)
        elif os.path.realpath(path) != os.path.realpath(other):
            if without_suffix(path) == without_suffix(other):
                raise ConfigError(
                    f"{paths[path]}: {path} and {other} would both be shard {name!r}; rename one"
                )
            name = _another_name(path, other, name, taken)
            taken.add(name)
            found[name] = _File(path, later=True)
    return found


def _another_name(path: str, other: str, name: str, taken: set[str]) -> str:
    """A name for a file whose name `other` has: with directories before it until nothing is called so."""
    directories = [part for part in Path(path).parts[:-1] if part.strip("./")]
    for number in range(1, len(directories) + 1 if Path(path).parent != Path(other).parent else 1):
        longer = _plain(".".join([*directories[-number:], name]))
        if longer not in taken and _fits(longer):
            return longer
    return _with_hash(name, path)


def _shard_name(path: str, at: str) -> str:
    suffix = suffix_of(path)
    if not suffix:
        raise ConfigError(f"{at}: {path} is none of {READABLE}")
    name = _plain(without_suffix(os.path.basename(path)))  # noqa: PTH119  a quarter of the time of a Path
    if not name:
        raise ConfigError(f"{at}: {path} has no name before {suffix}; rename it")
    return name if _fits(name) else _with_hash(name, path)


def _fits(name: str) -> bool:
    return len(name) <= _LONGEST_NAME and not repeats(name)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9_.]", "_", name.lower())


def _with_hash(name: str, path: str) -> str:
    return f"{name[: _LONGEST_NAME - 9]}.{hashlib.sha256(path.encode()).hexdigest()[:8]}"


def to_download(config: Config, lock: Lock) -> str | None:
    """A line that counts the listed files that are not here yet, by source; None when all are here."""
    root = Path(config.pathvars["data"])
    used: dict[str, tuple[Path, list[LockedFile]]] = {}
    for name, (_, source) in remote(config).items():
        used[name] = root / "raw" / name, list(itertools.islice(lock.files(name).values(), source.max_files))
    for model in hub_repositories(config):
        # An evaluation that is not asked for needs no list of its data.
        if model.kind == "model" or model.name in lock.models:
            used[model.name] = root / "hub" / model.place(lock), model.listed(lock)
    missing = []
    for name, (directory, listed) in used.items():
        here = {str(p.relative_to(directory)) for p in directory.rglob("*")} if directory.is_dir() else set()
        files = [file for file in listed if file.name not in here and file.sha256]  # "": only assumed
        if files:
            count = plural(len(files), "file")
            missing.append(f"{name} {count}, {size_text(sum(file.size for file in files))}")
    return f"To download: {'; '.join(missing)}" if missing else None
