"""The lock file: the files of each source and hub model, as scripts/lock_sources.py listed them.

Every job reads it: nothing but the standard library, and nothing that asks the network.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlsplit

from snaketron.config import ChatSource, Config, ConfigError, Corpus
from snaketron.files import shown
from snaketron.wording import plural

LOCK_VERSION = 1

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_SECRET = re.compile(r"(?i)signature|token|secret|password|passwd|credential|api_?key|access_?key|^sig$")


class LockedFile(NamedTuple):
    """A file that lies elsewhere, as it was when it was listed."""

    name: str  # of the downloaded file
    address: str
    size: int  # bytes
    sha256: str
    etag: str | None = None  # of its service, where that tells no hash


class Lock:
    """What scripts/lock_sources.py wrote: the files of each source that lies elsewhere and of each hub model.

    An entry is {"request": what was asked for, "revision": the commit or null, "files": [{"name",
    "address", "size", "sha256"}]}. Files whose service tells no hash have an "etag", too. "max_files" says
    that only so many files were listed, and "config" has the config.json of a model that trainings begin
    with. Sources are found by their names, models by OWNER/NAME[@REVISION]. `models` has the data sets of
    tasks, too, by datasets/OWNER/NAME[@REVISION].
    """

    def __init__(
        self,
        path: Path,
        sources: dict[str, Any],
        command: str = "",
        models: dict[str, Any] | None = None,
        *,
        assuming: bool = False,
    ) -> None:
        self.path = path
        self.sources = sources
        self.models = {} if models is None else models
        self.command = command  # lists the sources; messages tell the user to run it
        self.assuming = assuming  # whether files that are not listed are assumed, for a dry-run
        self.unlisted: dict[str, str] = {}  # what was assumed, by source or model, and what to do
        self._files: dict[str, dict[str, LockedFile]] = {}

    def files(self, source: str) -> dict[str, LockedFile]:
        """The files of a source by their names, in the order of the source. Raises `KeyError`."""
        return self._listed(source, self.sources)

    def model_files(self, model: str) -> dict[str, LockedFile]:
        """The files of a hub model by their names. Raises `KeyError`."""
        return self._listed(model, self.models)  # a model has a slash in its name, a source has none

    def _listed(self, name: str, entries: dict[str, Any]) -> dict[str, LockedFile]:
        if name not in self._files:
            self._files[name] = {file["name"]: LockedFile(**file) for file in entries[name]["files"]}
        return self._files[name]

    def file(self, owner: str, name: str) -> LockedFile:
        """One file of a source or a hub model, or `ConfigError`."""
        try:
            return self._listed(owner, self.models if "/" in owner else self.sources)[name]
        except KeyError:
            raise ConfigError(
                f"{self.path} lists no file {name!r} of {owner!r}; ask for one that is listed there"
            ) from None

    def check(self, source: Corpus | ChatSource, where: str) -> None:
        """Raise `ConfigError` unless the source was listed as it is configured now."""
        entry = self.sources.get(source.name)
        if entry is None:
            problem = f"its files are not listed in {self.path} yet"
        elif entry["request"] != request(source):
            was, now = json.dumps(entry["request"]), json.dumps(request(source))
            problem = f"{self.path} lists what {was} asked for, and now it is {now}"
        elif not enough(source, entry):
            now = f"max_files is {source.max_files}" if source.max_files else "all are asked for (max_files)"
            problem = f"{self.path} lists the first {plural(entry['max_files'], 'file')}, and now {now}"
        else:
            return
        said = f"{where} ({source.name}): {problem}. List them, and commit it:\n  {self.command}"
        if entry is not None or not self.assume(source.name, ("unlisted.jsonl",), said):
            raise ConfigError(said)

    def assume(self, owner: str, names: Sequence[str], said: str) -> bool:
        """Take files of these names for those that are not listed; False where nothing is assumed."""
        if self.assuming:
            self._files[owner] = {name: LockedFile(name, "", 0, "") for name in names}
            self.unlisted.setdefault(owner, said)
        return self.assuming

    def assumed(self) -> str | None:
        """What is not listed and was assumed, and the command that lists it; None where all is listed."""
        if len(self.unlisted) < 2:
            return next(iter(self.unlisted.values()), None)
        first, *others = self.unlisted
        return (
            f"the files of {first} and {plural(len(others), 'other source')} of the configuration are not "
            f"listed in {self.path} yet. List them, and commit it:\n  {self.command}"
        )


def read_lock(path: str | Path, configfiles: Iterable[str | Path] = (), *, assuming: bool = False) -> Lock:
    """Read the lock file; one that does not exist is empty. Raises `ConfigError`.

    `configfiles` are the user's `--configfile`, which messages repeat in the command to run. With `assuming`,
    files that it does not list are assumed, as a dry-run does.
    """
    overlays = [shown(file) for file in configfiles]
    command = shlex.join(
        ["python", "scripts/lock_sources.py", *(["--configfile", *overlays] if overlays else [])]
    )
    path = Path(path)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return Lock(path, {}, command, assuming=assuming)
    except OSError as error:
        raise ConfigError(f"sources_lock: {str(path)!r} cannot be read ({error.strerror})") from None
    try:
        content = json.loads(text)
        if content["version"] != LOCK_VERSION:
            raise ValueError(f"its version is {content['version']}, this program reads {LOCK_VERSION}")
        lock = Lock(path, content["sources"], command, content.get("models", {}), assuming=assuming)
        for entries in (lock.sources, lock.models):
            for name, entry in entries.items():
                entry["request"], entry["revision"], lock._listed(name, entries)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"sources_lock: {path} is not a lock file ({type(error).__name__}: {error}). "
            f"Restore the one that you committed, or delete it and list again:\n  {command}"
        ) from None
    return lock


def lock_text(lock: Lock) -> str:
    """The text of a lock file: entries by name, a line a file, so that a diff shows what changed."""
    parts = [f'  "sources": {_block(lock.sources)}']
    if lock.models:
        parts.append(f'  "models": {_block(lock.models)}')
    return f'{{\n  "version": {LOCK_VERSION},\n' + ",\n".join(parts) + "\n}\n"


def _block(entries: dict[str, Any]) -> str:
    blocks = []
    for name, entry in sorted(entries.items()):
        files = ",\n".join(f"        {json.dumps(file, sort_keys=True)}" for file in entry["files"])
        blocks.append(
            f"    {json.dumps(name)}: {{\n"
            f'      "request": {json.dumps(entry["request"], sort_keys=True)},\n'
            f'      "revision": {json.dumps(entry["revision"])},\n'
            + (f'      "max_files": {entry["max_files"]},\n' if "max_files" in entry else "")
            + (f'      "config": {json.dumps(entry["config"])},\n' if "config" in entry else "")
            + f'      "files": [\n{files}\n      ]\n'
            "    }"
        )
    return "{\n" + ",\n".join(blocks) + "\n  }"


def request(source: Corpus | ChatSource) -> dict[str, Any] | None:
    """The part of a source that decides which files are listed; None for files of this machine."""
    if source.hub:
        return {"hub": source.hub.model_dump()}
    if any(_ADDRESS.match(path) for path in source.paths):
        return {"paths": source.paths}
    return None


def enough(source: Corpus | ChatSource, entry: dict[str, Any]) -> bool:
    """Whether an entry lists as many files as a source uses."""
    listed = entry.get("max_files")
    return listed is None or (source.max_files is not None and source.max_files <= listed)


def remote(config: Config) -> dict[str, tuple[str, Corpus | ChatSource]]:
    """The sources that lie elsewhere, by name, with their places in the configuration."""
    found: dict[str, tuple[str, Corpus | ChatSource]] = {}
    for where, source in config.sources():
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
    """Refuse a secret in an address, because logs and commits show it, and a mix of files and addresses."""
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
