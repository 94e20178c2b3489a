"""Lists the files of sources and hub models, once, with sizes and hashes, for the lock file."""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from snaketron.config import ChatSource, Config, ConfigError, Corpus
from snaketron.files import write_text
from snaketron.log import UserError, logger
from snaketron.sources.addresses import Found, list_address
from snaketron.sources.download import fetch
from snaketron.sources.formats import suffix_of, without_suffix
from snaketron.sources.hub import list_hub, list_hub_address, list_model
from snaketron.sources.lockfile import Lock, lock_text, read_lock, remote, request
from snaketron.sources.models import HubModel, hub_models
from snaketron.sources.patience import Patience
from snaketron.wording import plural, size_text

_LONGEST_NAME = 150  # letters of a file's name; file systems take 255


def lock_sources(
    config: Config, *, names: Iterable[str] = (), update: bool = False, patience: Patience | None = None
) -> Lock:
    """List the sources and hub models that lie elsewhere into the lock file; return it.

    What was listed for the same request stays as it is unless `update`. With `names`, only these are
    listed; the entries of others stay. Each entry is written as soon as it is listed.
    """
    patience = patience or Patience()
    try:
        lock, sources, models = read_lock(config.sources_lock), remote(config), hub_models(config)
    except ConfigError as error:
        raise UserError(str(error)) from None
    todo: dict[str, tuple[dict[str, Any], Any, Callable[[dict[str, Any] | None], dict[str, Any]]]] = {}
    for name, (where, source) in sources.items():
        todo[name] = lock.sources, request(source), _lister(_source_entry, source, where, patience)
    for model in models:
        todo[model.path] = lock.models, model.request, _lister(_model_entry, model, patience)
    for name in names:
        if name not in todo:
            known = ", ".join(todo) or "none"
            raise UserError(f"--source {name}: nothing of that name lies elsewhere; what does: {known}")
    for name, (entries, asked, make) in todo.items():
        if names and name not in names:
            continue
        old = entries.get(name)
        if old and old["request"] == asked and not update:
            logger.info("%s: listed already, %s; --update lists it again", name, _summary(old))
            continue
        entries[name] = entry = {"request": asked} | make(old)
        write_text(lock.path, lock_text(lock))
        logger.info("%s: %s%s", name, _summary(entry), _changes(old, entry))
    if not todo:
        logger.info("no source of this configuration lies elsewhere")
    return lock


def _lister(make: Callable[..., dict[str, Any]], *arguments: Any) -> Callable[[Any], dict[str, Any]]:
    return lambda old: make(*arguments, old)


def _source_entry(
    source: Corpus | ChatSource, where: str, patience: Patience, old: dict[str, Any] | None
) -> dict[str, Any]:
    revision, found = _list_source(source, where, patience)
    whole = [_hashed(source.name, file, patience) for file in found]
    known = {Found(f["address"], "").location: f["name"] for f in old["files"]} if old else {}
    return {"revision": revision, "files": _listed(file_names(whole, known), whole)}


def _list_source(
    source: Corpus | ChatSource, where: str, patience: Patience
) -> tuple[str | None, list[Found]]:
    if source.hub:
        return list_hub(source.hub, f"{where}.hub", patience)
    commits: set[str | None] = set()
    found: list[Found] = []
    for i, path in enumerate(source.paths):
        at = f"{where}.paths[{i}]"
        if path.startswith("hf://"):
            commit, files = list_hub_address(path, at, patience)
        else:
            commit, files = None, list_address(path, at, patience)
        commits.add(commit)
        found += files
    # Addresses of several commits have no common one: each file's address has its own.
    return commits.pop() if len(commits) == 1 else None, list(dict.fromkeys(found))


def _model_entry(model: HubModel, patience: Patience, _old: Any) -> dict[str, Any]:
    commit, found = list_model(model, patience)
    whole = [_hashed(model.path, file, patience) for file in found]
    return {"revision": commit, "files": _listed([file.path for file in whole], whole)}


def _listed(names: list[str], files: list[Found]) -> list[dict[str, Any]]:
    return [
        {"name": name, "address": file.address, "size": file.size, "sha256": file.sha256}
        for name, file in zip(names, files, strict=True)
    ]


def _hashed(name: str, file: Found, patience: Patience) -> Found:
    """The file with size and hash; where the service gives no hash, the file is read for it."""
    if file.sha256 is not None and file.size is not None:
        return file
    size = size_text(file.size) if file.size is not None else "of unknown size"
    logger.info("%s: reading %s (%s) for its hash, which its service does not tell", name, file.address, size)
    digest = hashlib.sha256()
    read = fetch(file.address, digest.update, size=file.size, patience=patience)
    return replace(file, size=read, sha256=digest.hexdigest())


def file_names(files: list[Found], known: dict[str, str]) -> list[str]:
    """A name for each file, made from its path below the directory that all share.

    `known` maps locations to names that files keep. No two names are equal before their suffix.
    """
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
        if len(stem) > _LONGEST_NAME or counts[stem] > 1 or stem in taken:
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
