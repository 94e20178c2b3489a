"""Lists the files of sources and hub models, once, with sizes and hashes, for the lock file."""

from __future__ import annotations

import functools
import hashlib
import json
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from snaketron.config import ChatSource, Config, Corpus
from snaketron.config.names import repeats
from snaketron.files import write_text
from snaketron.log import UserError, logger
from snaketron.sources.addresses import Found, list_address
from snaketron.sources.download import fetch
from snaketron.sources.formats import suffix_of, without_suffix
from snaketron.sources.hashes import Known, hash_files
from snaketron.sources.hub import list_hub, list_hub_address, list_repository
from snaketron.sources.lockfile import Lock, enough, lock_text, read_lock, remote, request
from snaketron.sources.models import CHECKPOINT, HubRepository, hub_repositories
from snaketron.sources.patience import Patience
from snaketron.wording import plural, size_text

_LONGEST_NAME = 150  # letters of a file's name; file systems take 255


class Task(NamedTuple):
    """A source or a model to list."""

    entries: dict[str, Any]  # of the lock file, where its entry lies under its name
    request: dict[str, Any] | None
    make: Callable[[dict[str, Any] | None], dict[str, Any]]  # its new entry, from the old one
    enough: Callable[[dict[str, Any]], bool]  # whether an entry lists as many files as are used


def lock_sources(
    config: Config, *, names: Collection[str] = (), update: bool = False, patience: Patience | None = None
) -> Lock:
    """List the sources and hub models that lie elsewhere into the lock file; return it.

    What was listed for the same request stays as it is unless `update`. With `names`, only these are
    listed; the entries of others stay. Each entry is written as soon as it is listed, and hashes are kept as
    soon as they are known, so an interrupted run goes on from there.
    """
    lock = read_lock(config.sources_lock)
    tasks = _tasks(config, lock, update, patience or Patience())
    for name in names:
        if name not in tasks:
            known = ", ".join(tasks) or "none"
            raise UserError(f"--source {name}: nothing of that name lies elsewhere; what does: {known}")
    for name, task in tasks.items():
        if names and name not in names:
            continue
        old = task.entries.get(name)
        if old and old["request"] == task.request and task.enough(old) and not update:
            logger.info("%s: listed already, %s; --update lists it again", name, _summary(old))
            continue
        task.entries[name] = entry = {"request": task.request} | task.make(old)
        write_text(lock.path, lock_text(lock))
        logger.info("%s: %s%s", name, _summary(entry), _changes(old, entry))
    if not tasks:
        logger.info("no source of this configuration lies elsewhere")
    if not names:
        Known(lock).forget()
    return lock


def _tasks(config: Config, lock: Lock, update: bool, patience: Patience) -> dict[str, Task]:
    """What to list, by name."""
    known, tasks = Known(lock), {}
    for name, (where, source) in remote(config).items():
        make = functools.partial(_source_entry, source, where, known, update, patience)
        tasks[name] = Task(lock.sources, request(source), make, functools.partial(enough, source))
    for model in hub_repositories(config):
        make = functools.partial(_model_entry, model, known, patience)
        tasks[model.name] = Task(lock.models, model.request, make, lambda _: True)
    return tasks


def _source_entry(
    source: Corpus | ChatSource,
    where: str,
    known: Known,
    update: bool,
    patience: Patience,
    old: dict[str, Any] | None,
) -> dict[str, Any]:
    more = old and old["request"] == request(source) and not update  # of the files at the pinned commit
    if source.hub and old and more:
        pinned = source.hub.model_copy(update={"revision": old["revision"]})
        source = source.model_copy(update={"hub": pinned})
    revision, found = _list_source(source, where, patience)
    whole = hash_files(source.name, found, known, patience)
    names = {Found(f["address"], "").location: f["name"] for f in old["files"]} if old else {}
    limit = {"max_files": source.max_files} if source.max_files else {}
    return {"revision": revision, **limit, "files": _listed(file_names(whole, names), whole)}


def _list_source(
    source: Corpus | ChatSource, where: str, patience: Patience
) -> tuple[str | None, list[Found]]:
    """The commit of a source, where it has one, and its first `max_files` files."""
    limit = source.max_files
    if source.hub:
        return list_hub(source.hub, f"{where}.hub", patience, limit)
    commits: set[str | None] = set()
    found: dict[Found, None] = {}  # in the order of the addresses; what two of them name is one file
    for i, path in enumerate(source.paths):
        if limit and len(found) >= limit:
            break
        at = f"{where}.paths[{i}]"
        if path.startswith("hf://"):
            commit, files = list_hub_address(path, at, patience, limit)
        else:
            commit, files = None, list_address(path, at, patience)
        commits.add(commit)
        found |= dict.fromkeys(files)
    # Addresses of several commits have no common one: each file's address has its own.
    return commits.pop() if len(commits) == 1 else None, list(found)[:limit]


def _model_entry(model: HubRepository, known: Known, patience: Patience, _old: Any) -> dict[str, Any]:
    commit, found = list_repository(model, patience)
    whole = hash_files(model.name, found, known, patience)
    entry: dict[str, Any] = {"revision": commit, "files": _listed([file.path for file in found], whole)}
    config = next((file for file in whole if file.path == "config.json"), None)
    if config and model.wanted is CHECKPOINT:  # a dry-run compares it before the weights are downloaded
        entry["config"] = _config(config, patience)
    return entry


def _config(file: Found, patience: Patience) -> dict[str, Any]:
    """The content of a config.json; `UserError` where it is none."""
    content = bytearray()
    fetch(file.address, content.extend, size=file.size, patience=patience, quiet=True)
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file.address}: not the configuration of a model ({error})") from None


def _listed(names: list[str], files: list[Found]) -> list[dict[str, Any]]:
    return [
        {"name": name, "address": file.address, "size": file.size, "sha256": file.sha256}
        | ({"etag": file.etag} if file.etag else {})
        for name, file in zip(names, files, strict=True)
    ]


def file_names(files: list[Found], known: dict[str, str]) -> list[str]:
    """A name for each file, made from its path below the directory that all share.

    `known` maps locations to names that files keep, if they are still of that kind. No two names are equal
    before their suffix.
    """
    known = {
        file.location: name
        for file in files
        if (name := known.get(file.location)) and suffix_of(name) == suffix_of(file.path)
    }
    paths = {file: file.path.lstrip("/") for file in files}
    root = posixpath.commonpath([posixpath.dirname(path) for path in paths.values()]) if files else ""
    taken = {known[file.location].split(".")[0] for file in files if file.location in known}
    stems = {file: _stem(posixpath.relpath(path, root or ".")) for file, path in paths.items()}
    counts = Counter(stem for file, stem in stems.items() if file.location not in known)
    names = []
    for file, stem in stems.items():
        if file.location in known:
            names.append(known[file.location])
            continue
        if len(stem) > _LONGEST_NAME or counts[stem] > 1 or stem in taken or repeats(stem):
            stem = f"{stem[: _LONGEST_NAME - 9]}_{hashlib.sha256(file.location.encode()).hexdigest()[:8]}"
        names.append(stem + suffix_of(file.path))
    return names


def _stem(path: str) -> str:
    return re.sub(r"[^a-z0-9_]", "_", without_suffix(path).lower()) or "_"


def _summary(entry: dict[str, Any]) -> str:
    files = entry["files"]
    count = plural(len(files), "file")
    revision = f", revision {entry['revision']}" if entry["revision"] else ""
    return f"{count}, {size_text(sum(file['size'] for file in files))}{revision}"


def _changes(old: dict[str, Any] | None, new: dict[str, Any]) -> str:
    if old is None:
        return ""
    before, after = ({f["name"]: f["sha256"] for f in entry["files"]} for entry in (old, new))
    changed = sum(after[name] != before[name] for name in after.keys() & before.keys())
    added, removed = len(after.keys() - before.keys()), len(before.keys() - after.keys())
    return f" ({added} added, {removed} removed, {changed} changed)"
