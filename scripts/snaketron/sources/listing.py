"""Lists the files of sources that lie elsewhere, once, with sizes and hashes, for the lock file."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import posixpath
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote, urlsplit

from snaketron.config import ChatSource, Config, ConfigError, Corpus, Hub
from snaketron.files import write_text
from snaketron.log import UserError, logger
from snaketron.sources.download import Patience, fetch
from snaketron.sources.lockfile import Lock, lock_text, read_lock, remote, request
from snaketron.sources.shards import SUFFIXES, suffix_of
from snaketron.sources.streams import filesystem
from snaketron.wording import plural, size_text

_AT_A_TIME = 100  # paths of one question to the hub
_LONGEST_NAME = 150  # letters of a file's name; file systems take 255


@dataclass(frozen=True)
class Found:
    """A file that lies elsewhere, before its name is chosen."""

    address: str
    path: str  # at its service; the name here is made from it
    size: int | None = None
    sha256: str | None = None  # None: the service does not tell

    @property
    def location(self) -> str:
        """The address without a revision: the same file before and after a new commit."""
        return re.sub(r"^(hf://datasets/[^@]+)@[^/]+", r"\1", self.address)


def lock_sources(
    config: Config, *, names: Iterable[str] = (), update: bool = False, patience: Patience | None = None
) -> Lock:
    """List the sources that lie elsewhere into the lock file; return it.

    A source that was listed for the same request stays as it is unless `update`. With `names`, only these
    sources are listed; the entries of others stay. Each source is written as soon as it is listed.
    """
    try:
        lock, sources = read_lock(config.sources_lock), remote(config)
    except ConfigError as error:
        raise UserError(str(error)) from None
    for name in names:
        if name not in sources:
            known = ", ".join(sources) or "none"
            raise UserError(f"--source {name}: no source of that name lies elsewhere; those that do: {known}")
    for name, (where, source) in sources.items():
        if names and name not in names:
            continue
        old = lock.sources.get(name)
        if old and old["request"] == request(source) and not update:
            logger.info("%s: listed already, %s; --update lists it again", name, _summary(old))
            continue
        lock.sources[name] = entry = _entry(source, where, old, patience or Patience())
        write_text(lock.path, lock_text(lock.sources))
        logger.info("%s: %s%s", name, _summary(entry), _changes(old, entry))
    if not sources:
        logger.info("no source of this configuration lies elsewhere")
    return lock


def _entry(
    source: Corpus | ChatSource, where: str, old: dict[str, Any] | None, patience: Patience
) -> dict[str, Any]:
    revision: str | None
    if source.hub:
        revision, found = list_hub(source.hub, f"{where}.hub")
    else:
        listed = [list_address(path, f"{where}.paths[{i}]") for i, path in enumerate(source.paths)]
        commits = {commit for commit, _ in listed}
        revision = commits.pop() if len(commits) == 1 else None  # else each address has its own
        found = list(dict.fromkeys(file for _, files in listed for file in files))
    whole = [_hashed(source.name, file, patience) for file in found]
    known = {Found(f["address"], "").location: f["name"] for f in old["files"]} if old else {}
    files = [
        {"name": name, "address": file.address, "size": file.size, "sha256": file.sha256}
        for name, file in zip(file_names(whole, known), whole, strict=True)
    ]
    return {"request": request(source), "revision": revision, "files": files}


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
    return re.sub(r"[^a-z0-9_]", "_", path.removesuffix(suffix_of(path)).lower()) or "_"


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


# ------------------------------------------------------------------------------------------- addresses


def list_address(address: str, at: str) -> tuple[str | None, list[Found]]:
    """List an address (a file, directory or glob): its commit, if there is one, and its files.

    `at` is its place in the configuration. Raises `UserError`.
    """
    if address.startswith(("http://", "https://")):
        path = unquote(urlsplit(address).path)
        return None, _readable([Found(address, path)], at)
    if address.startswith("hf://"):
        return _list_hub_address(address, at)
    system, path = filesystem(address)
    with _asking(at, address):
        found = _list(system, path)
    listed = [
        Found(system.unstrip_protocol(name), name, info.get("size")) for name, info in sorted(found.items())
    ]
    if not listed:
        raise UserError(f"{at}: no {', '.join(SUFFIXES)} file at {address}")
    return None, _readable(listed, at)


def _list(system: Any, path: str) -> dict[str, Any]:
    """Files of an fsspec file system, by path: those of a glob, of a directory at any depth, or one."""
    from fsspec.core import has_magic

    if has_magic(path):
        found = system.glob(path, detail=True)
        return {name: info for name, info in found.items() if info["type"] == "file"}
    if system.isfile(path):
        return {path: system.info(path)}
    found = system.find(path, detail=True) if system.exists(path) else {}
    root = path.rstrip("/")
    return {
        name: info
        for name, info in found.items()
        if suffix_of(name) and not any(p.startswith(".") for p in name.removeprefix(root).split("/"))
    }


def _list_hub_address(address: str, at: str) -> tuple[str, list[Found]]:
    from huggingface_hub import HfFileSystem
    from huggingface_hub.utils import parse_hf_uri

    with _asking(at, address):
        parsed = parse_hf_uri(address)
    if parsed.type != "dataset":
        raise UserError(f"{at}: {address} is not of the form hf://datasets/OWNER/NAME[@REVISION]/PATH")
    commit = _commit(parsed.id, parsed.revision or "main", at)
    root = f"datasets/{parsed.id}@{commit}"
    with _asking(at, address):
        found = _list(HfFileSystem(), posixpath.join(root, parsed.path_in_repo))
    if not found:
        raise UserError(f"{at}: no {', '.join(SUFFIXES)} file at {address}")
    # Some versions of the client put the revision into the paths that they return, some do not.
    paths = [re.sub(rf"^datasets/{re.escape(parsed.id)}(@[^/]+)?/", "", name) for name in found]
    return commit, _hub_files(parsed.id, commit, paths, at)


def _readable(files: list[Found], at: str) -> list[Found]:
    other = [file.address for file in files if not suffix_of(file.path)]
    if other:
        count = f" and {len(other) - 1} more" if len(other) > 1 else ""
        raise UserError(f"{at}: {other[0]}{count} is none of {', '.join(SUFFIXES)}")
    return files


# --------------------------------------------------------------------------------------------- the hub


def list_hub(hub: Hub, at: str) -> tuple[str, list[Found]]:
    """The commit and the files of a split of a configuration, as the `datasets` library finds them.

    Both names must be exactly those of the data set. `at` is the place in the configuration. Raises
    `UserError`.
    """
    from datasets.load import dataset_module_factory, get_dataset_builder_class, load_dataset_builder

    if not re.fullmatch(r"[^/@:]+/[^/@:]+", hub.repository):
        raise UserError(f"{at}.repository: {hub.repository!r} is not of the form OWNER/NAME")
    commit = _commit(hub.repository, hub.revision, at)
    path = f"hf://datasets/{hub.repository}"  # a bare name might be a directory here
    with tempfile.TemporaryDirectory() as cache, _asking(at, hub.repository):
        # An empty cache: from the user's own, the library would answer when the hub fails.
        module = dataset_module_factory(path, revision=commit, cache_dir=cache)
        builder = get_dataset_builder_class(module)
        names = list(builder.builder_configs) or ["default"]
        default = builder.DEFAULT_CONFIG_NAME or (names[0] if len(names) == 1 else None)
        configuration = hub.configuration or default
        if configuration is None:
            raise UserError(
                f"{at}.configuration: {hub.repository} has several; name one of {_list_of(names)}"
            )
        if configuration not in names:
            raise UserError(_unknown(f"{at}.configuration", configuration, names, hub.repository))
        resolved = load_dataset_builder(path, configuration, revision=commit, cache_dir=cache)
        splits = {str(split): list(files) for split, files in resolved.config.data_files.items()}
    if hub.split not in splits:
        of = f"{hub.repository}, configuration {configuration}"
        raise UserError(_unknown(f"{at}.split", hub.split, list(splits), of))
    prefix = f"{path}@{commit}/"
    return commit, _hub_files(hub.repository, commit, [f.removeprefix(prefix) for f in splits[hub.split]], at)


def _commit(repository: str, revision: str, at: str) -> str:
    """The commit that a branch, a tag or a commit is now."""
    from huggingface_hub import HfApi

    with _asking(at, f"{repository} at {revision}"):
        return str(HfApi().dataset_info(repository, revision=revision).sha)


def _hub_files(repository: str, commit: str, paths: Iterable[str], at: str) -> list[Found]:
    """Sizes and hashes of files of a data set, in the order of their paths."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    paths = sorted(set(paths))
    root = f"hf://datasets/{repository}@{commit}"
    _readable([Found(f"{root}/{path}", path) for path in paths], at)
    known: dict[str, RepoFile] = {}
    for i in range(0, len(paths), _AT_A_TIME):
        with _asking(at, repository):
            infos = HfApi().get_paths_info(
                repository, paths[i : i + _AT_A_TIME], repo_type="dataset", revision=commit
            )
        known |= {info.path: info for info in infos if isinstance(info, RepoFile)}
    missing = [path for path in paths if path not in known]
    if missing:
        raise UserError(f"{at}: the hub does not know {missing[0]} of {repository} at {commit}; try again")
    return [
        Found(f"{root}/{path}", path, known[path].size, lfs.sha256 if (lfs := known[path].lfs) else None)
        for path in paths
    ]


def _unknown(at: str, name: str, known: list[str], of: str) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{at}: {of} has no {name!r}{hint} There are {_list_of(known)}"


def _list_of(names: list[str]) -> str:
    shown = ", ".join(names[:50])
    return f"{shown} and {len(names) - 50} more" if len(names) > 50 else shown


@contextlib.contextmanager
def _asking(at: str, what: str) -> Iterator[None]:
    """Turn an exception of a service's client into a `UserError` that names `at` in the configuration."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # exceptions of these clients have no common class
        logger.debug("%s: %s", at, what, exc_info=True)
        if "scripts are no longer supported" in str(error):
            why = "a program makes this data set, which is not run; convert it to files that can be read"
        elif isinstance(error, ImportError):
            why = str(error)
        else:
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{at}: {what}: {why}") from None
