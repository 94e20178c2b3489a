"""Which raw files there are: listed from disk, or, where they lie elsewhere, from the lock file.

Every job parses this: nothing but the standard library, and nothing that asks the network.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from snaketron.config import ChatSource, Config, ConfigError, Corpus

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
# Names of downloaded files. There is no point before the suffix, so that FILE.json is never one of them.
DOWNLOADED = r"[a-z0-9_]+\.(?:jsonl?(?:\.gz|\.zst)?|parquet|arrow)"
LOCK_VERSION = 1

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SECRET = re.compile(r"(?i)signature|token|secret|password|passwd|credential|api_?key|access_?key|^sig$")


# --------------------------------------------------------------------------------------- the lock file


class LockedFile(NamedTuple):
    """A file that lies elsewhere, as it was when it was listed."""

    name: str  # of the downloaded file
    address: str
    size: int  # bytes
    sha256: str


class Lock:
    """What scripts/lock_sources.py wrote: the files of each source that lies elsewhere."""

    def __init__(self, path: Path, sources: dict[str, Any], command: str = "") -> None:
        self.path = path
        self.sources = sources
        self.command = command  # that lists sources
        self._files: dict[str, dict[str, LockedFile]] = {}

    def files(self, source: str) -> dict[str, LockedFile]:
        """The files of a source by their names, in the order of the source. Raises `KeyError`."""
        if source not in self._files:
            listed = self.sources[source]["files"]
            self._files[source] = {file["name"]: LockedFile(**file) for file in listed}
        return self._files[source]

    def file(self, source: str, name: str) -> LockedFile:
        """One file, or `ConfigError`."""
        try:
            return self.files(source)[name]
        except KeyError:
            raise ConfigError(f"{self.path} lists no file {name!r} of a source {source!r}") from None

    def check(self, source: Corpus | ChatSource, where: str) -> None:
        """Raise `ConfigError` unless the source was listed as it is configured now."""
        entry = self.sources.get(source.name)
        if entry is None:
            problem = f"its files are not listed in {self.path} yet"
        elif entry["request"] != request(source):
            was, now = json.dumps(entry["request"]), json.dumps(request(source))
            problem = f"{self.path} lists what {was} asked for, and now it is {now}"
        else:
            return
        raise ConfigError(f"{where} ({source.name}): {problem}. List them, and commit it:\n  {self.command}")


def read_lock(path: str | Path, configfiles: Iterable[str | Path] = ()) -> Lock:
    """Read the lock file; one that does not exist is empty. Raises `ConfigError`.

    `configfiles` are those of the command line, for the command that messages name.
    """
    overlays = [_shown(file) for file in configfiles]
    command = shlex.join(
        ["python", "scripts/lock_sources.py", *(["--configfile", *overlays] if overlays else [])]
    )
    path = Path(path)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return Lock(path, {}, command)
    try:
        content = json.loads(text)
        if content["version"] != LOCK_VERSION:
            raise ValueError(f"its version is {content['version']}, this program reads {LOCK_VERSION}")
        lock = Lock(path, content["sources"], command)
        for name, entry in lock.sources.items():
            entry["request"], entry["revision"], lock.files(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"sources_lock: {path} is not a lock file ({type(error).__name__}: {error}). "
            f"Restore the one that you committed, or delete it and list again:\n  {command}"
        ) from None
    return lock


def request(source: Corpus | ChatSource) -> dict[str, Any] | None:
    """What the lock file must have been made for; None for files of this machine."""
    if source.hub:
        return {"hub": source.hub.model_dump()}
    if any(_ADDRESS.match(path) for path in source.paths):
        return {"paths": source.paths}
    return None


def remote(config: Config) -> dict[str, tuple[str, Corpus | ChatSource]]:
    """The sources that lie elsewhere, by name, with their places in the configuration."""
    found: dict[str, tuple[str, Corpus | ChatSource]] = {}
    sources: list[tuple[str, Corpus | ChatSource]] = []
    sources += [(f"corpora[{i}]", c) for i, c in enumerate(config.corpora)]
    sources += [(f"chats[{i}]", c) for i, c in enumerate(config.chats)]
    for where, source in sources:
        if request(source) is None:
            continue
        if source.name in found:
            raise ConfigError(
                f"{where}: {found[source.name][0]} is called {source.name!r} too, and the files of both "
                f"would be downloaded to raw/{source.name}; rename one"
            )
        check_addresses(source, where)
        found[source.name] = (where, source)
    return found


def check_addresses(source: Corpus | ChatSource, where: str) -> None:
    """Refuse secrets, which would get into logs and commits, and a mix of files and addresses."""
    for i, path in enumerate(source.paths):
        at = f"{where}.paths[{i}]"
        if not _ADDRESS.match(path):
            raise ConfigError(
                f"{at}: {path} is of this machine and others of {source.name} are addresses; make two sources"
            )
        parts = urlsplit(path)
        plain = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        if "@" in parts.netloc:
            raise ConfigError(
                f"{at}: {plain} is given with a user name or password; put credentials into the environment"
            )
        if any(_SECRET.search(name) for name, _ in parse_qsl(parts.query, keep_blank_values=True)):
            raise ConfigError(
                f"{at}: {plain} is given with a signature or token, which expires and is a secret; "
                "give an address without, and put credentials into the environment"
            )


def to_download(config: Config, lock: Lock) -> str | None:
    """How many files and bytes of which sources are listed and not yet here; None when all are."""
    root = Path(config.pathvars.get("data", "data")) / "raw"
    missing = []
    for name, (_, source) in remote(config).items():
        used = itertools.islice(lock.files(name).values(), source.max_files)
        here = {path.name for path in (root / name).iterdir()} if (root / name).is_dir() else set()
        files = [file for file in used if file.name not in here]
        if files:
            count = "1 file" if len(files) == 1 else f"{len(files)} files"
            missing.append(f"{name} {count}, {size_text(sum(file.size for file in files))}")
    return f"To download: {'; '.join(missing)}" if missing else None


def size_text(size: float) -> str:
    """A number of bytes as a person reads it: 3.4 GB is 3.4e9 bytes."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 99.5 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


# ------------------------------------------------------------------------------------------ the shards


def shards(
    source: Corpus | ChatSource, where: str, lock: Lock, shard_size: int | None = None
) -> dict[str, list[str]]:
    """Map each shard's name to its raw files, in the order in which they are read.

    A shard is called after its first file, without path and suffix. With `shard_size`, files are put
    together by name until a shard has so many bytes. Of a limited source all files, in the order of the
    configuration, are the one shard `sample`. Files after the first `max_files` are left out.
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
    """Of each file that lies elsewhere, by the name of its shard: where it is downloaded to, and its size."""
    check_addresses(source, where)
    lock.check(source, where)
    return {
        name.split(".")[0]: (f"<data>/raw/{source.name}/{name}", file.size)
        for name, file in lock.files(source.name).items()
    }


def _local(source: Corpus | ChatSource, where: str) -> dict[str, tuple[str, int | None]]:
    """Of each file of this machine, by the name of its shard: its path; its size is not known yet."""
    found: dict[str, str] = {}
    for i, pattern in enumerate(source.paths):
        at = f"{where}.paths[{i}]"
        for path in _files(pattern, at):
            name = _shard_name(path, at)
            if found.setdefault(name, path) != path:
                raise ConfigError(f"{at}: {path} and {found[name]} would both be shard {name!r}; rename one")
    return {name: (path, None) for name, path in found.items()}


def suffix_of(path: str) -> str:
    """The suffix, of those that can be read; "" for another kind of file."""
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
    """The raw files of a directory. Hidden ones belong to the program that still downloads or edits them."""
    for here, directories, names in directory.walk():
        directories[:] = [name for name in directories if not _hidden(name)]
        for name in names:
            if name.endswith(SUFFIXES) and not _hidden(name) and (here / name).is_file():
                yield str(here / name)


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _missing(message: str) -> list[str]:
    raise ConfigError(message)


def _shown(path: str | Path) -> str:
    """A path as the user would give it."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
