"""Which raw files there are: listed from disk, or, where they lie elsewhere, from the lock file.

Every job lists them: nothing but the standard library, and nothing that asks the network.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from snaketron.config import ChatSource, Config, ConfigError, Corpus
from snaketron.config.names import unusable
from snaketron.sources.lockfile import Lock, LockedFile, check_addresses, remote, request
from snaketron.sources.models import hub_models
from snaketron.wording import plural, size_text

SUFFIXES = (
    ".jsonl",
    ".jsonl.gz",
    ".jsonl.zst",
    ".json",
    ".json.gz",
    ".json.zst",
    ".parquet",
    ".arrow",
)
SAMPLE = re.compile(r"data/sample/([a-z0-9_]+)/part_\d+\.jsonl")
# Names of downloaded files. A name has no point before its suffix, so FILE.json, a record, never matches.
DOWNLOADED = r"[a-z0-9_]+\.(?:jsonl?(?:\.gz|\.zst)?|parquet|arrow)"


def shards(
    source: Corpus | ChatSource, where: str, lock: Lock, shard_size: int | None = None
) -> dict[str, list[str]]:
    """Map each shard's name to its raw files, in the order in which they are read.

    A shard is called after its first file, without path and suffix. With `shard_size`, files are put
    together by name until a shard has so many bytes. A limited source has one shard, `sample`: all its
    files in the order of the configuration. Files after the first `max_files` are left out.
    A file of the sample may not exist yet; anything else must. Raises `ConfigError`.
    """
    files = _remote(source, where, lock) if request(source) else _local(source, where)
    files = dict(itertools.islice(files.items(), source.max_files))
    if source.limited:
        return {"sample": [path for path, _ in files.values()]}
    found: dict[str, list[str]] = {}
    room = 0  # bytes that the shard of the last file may still take
    for name, (path, size) in sorted(files.items()):
        if shard_size and size is None and not SAMPLE.fullmatch(path):
            size = Path(path).stat().st_size
        if room > 0 and size is not None:
            found[next(reversed(found))].append(path)
            room -= size
        else:
            found[name] = [path]
            room = shard_size - size if shard_size and size is not None else 0
    return found


def _remote(source: Corpus | ChatSource, where: str, lock: Lock) -> dict[str, tuple[str, int | None]]:
    """Map the shard name of each file that lies elsewhere to where it is downloaded to, and its size."""
    check_addresses(source, where)
    lock.check(source, where)
    found: dict[str, tuple[str, int | None]] = {}
    for name, file in lock.files(source.name).items():
        shard, path = name.split(".")[0], f"<data>/raw/{source.name}/{name}"
        if shard in found:
            other = Path(found[shard][0]).name
            raise ConfigError(
                f"{where}: in {lock.path}, {name} and {other} would both be shard {shard!r}; list them again"
            )
        found[shard] = path, file.size
    return found


def _local(source: Corpus | ChatSource, where: str) -> dict[str, tuple[str, int | None]]:
    """Map the shard name of each file of this machine to its path; its size is asked for only if needed."""
    found: dict[str, str] = {}
    for i, pattern in enumerate(source.paths):
        at = f"{where}.paths[{i}]"
        for path in _files(pattern, at):
            if problem := unusable(path):
                raise ConfigError(f"{at}: {problem}")
            if path.startswith("-"):  # programs would take it for an option
                path = str(Path(path).absolute())
            name = _shard_name(path, at)
            if found.setdefault(name, path) != path:
                raise ConfigError(f"{at}: {path} and {found[name]} would both be shard {name!r}; rename one")
    return {name: (path, None) for name, path in found.items()}


def suffix_of(path: str) -> str:
    """The one of `SUFFIXES` that a path ends in; "" for a file that cannot be read."""
    return max((s for s in SUFFIXES if path.endswith(s)), key=len, default="")


def _shard_name(path: str, at: str) -> str:
    suffix = suffix_of(path)
    if not suffix:
        raise ConfigError(f"{at}: {path} is none of {', '.join(SUFFIXES)}")
    name = re.sub(r"[^a-z0-9_.]", "_", Path(path).name.removesuffix(suffix).lower())
    if not name:
        raise ConfigError(f"{at}: {path} has no name before {suffix}; rename it")
    return name


def _files(pattern: str, at: str) -> list[str]:
    if SAMPLE.fullmatch(pattern):
        return [pattern]
    path = Path(pattern)
    if path.is_dir():
        files = sorted(_below(path))
        return files or _missing(f"{at}: no {', '.join(SUFFIXES)} file in the directory {pattern}")
    if path.is_file():
        return [str(path)]
    if not any(c in pattern for c in "*?["):
        return _missing(f"{at}: {pattern} does not exist (relative paths start at {Path.cwd()})")
    root = Path(path.anchor)
    matched = (p for p in root.glob(str(path.relative_to(root))) if p.is_file())
    files = sorted(str(p) for p in matched if not _hidden(p.name) or _hidden(path.name))
    return files or _missing(f"{at}: no file matches {pattern}")


def _below(directory: Path) -> Iterator[str]:
    """The raw files of a directory. A hidden file belongs to a program that still downloads or edits it."""
    for here, directories, names in directory.walk():
        directories[:] = [name for name in directories if not _hidden(name)]
        for name in names:
            if name.endswith(SUFFIXES) and not _hidden(name) and (here / name).is_file():
                yield str(here / name)


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _missing(message: str) -> list[str]:
    raise ConfigError(message)


def to_download(config: Config, lock: Lock) -> str | None:
    """A line that counts the listed files that are not here yet, by source; None when all are here."""
    root = Path(config.pathvars.get("data", "data"))
    used: dict[str, tuple[Path, list[LockedFile]]] = {}
    for name, (_, source) in remote(config).items():
        used[name] = root / "raw" / name, list(itertools.islice(lock.files(name).values(), source.max_files))
    for model in hub_models(config):
        used[model.path] = root / "hub" / model.path, model.listed(lock)
    missing = []
    for name, (directory, listed) in used.items():
        here = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
        files = [file for file in listed if file.name not in here]
        if files:
            count = plural(len(files), "file")
            missing.append(f"{name} {count}, {size_text(sum(file.size for file in files))}")
    return f"To download: {'; '.join(missing)}" if missing else None
