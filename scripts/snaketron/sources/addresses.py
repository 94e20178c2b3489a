"""Lists what lies at an address: a file, a directory or a glob of an object store or another file system."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from snaketron.log import UserError, logger
from snaketron.sources.formats import MAX_NAMED, READABLE, suffix_of
from snaketron.sources.patience import Patience, ask
from snaketron.sources.streams import filesystem
from snaketron.wording import some


@dataclass(frozen=True)
class Found:
    """A file that lies elsewhere, before its name is chosen."""

    address: str
    path: str  # at its service; the name here is made from it
    size: int | None = None
    sha256: str | None = None  # None: the service does not tell
    etag: str | None = None  # what its service gives the content, which stays as long as the content does

    @property
    def location(self) -> str:
        """The address without a revision: the same file before and after a new commit."""
        return re.sub(r"^(hf://(?:datasets/)?[^@/]+/[^@/]+)@[^/]+", r"\1", self.address)


def list_address(address: str, at: str, patience: Patience) -> list[Found]:
    """The files at an address (a file, directory or glob), in the order of their paths.

    `at` is its place in the configuration. Raises `UserError`.
    """
    if address.startswith(("http://", "https://")):
        return readable([Found(address, unquote(urlsplit(address).path))], at)
    system, path = filesystem(address)
    found = list_files(system, path, at, address, patience)
    listed = [
        Found(system.unstrip_protocol(name), name, info.get("size"), etag=_etag(info))
        for name, info in sorted(found.items())
    ]
    if not listed:
        raise UserError(f"{at}: no {READABLE} file at {address}")
    for name, info in found.items():
        # The client of GCS, which tells the encoding in a listing, decompresses on the way, and then neither
        # sizes nor bytes to go on from are those that are stored. The client of S3 gives what is stored.
        if info.get("contentEncoding") == "gzip":
            raise UserError(
                f"{at}: {system.unstrip_protocol(name)} is stored with Content-Encoding: gzip, which GCS may "
                "decompress on the way. Clear it (gcloud storage objects update --clear-content-encoding), "
                "and give the object a name that ends in .gz"
            )
    return readable(listed, at)


def _etag(info: dict[str, Any]) -> str | None:
    """The entity tag of an object (S3, GCS, Azure); None where the file system has none."""
    tag = info.get("ETag") or info.get("etag")
    return str(tag).strip('"') if tag else None


def list_files(system: Any, path: str, at: str, address: str, patience: Patience) -> dict[str, Any]:
    """Files of an fsspec file system, by path: one, those of a glob, or those of a directory at any depth.

    What is a file by exactly this path is that file, even if its name holds a `[`, `*` or `?`.
    """
    from fsspec.core import has_magic

    # A short question first: an endpoint that does not answer is found out before a long one.
    if ask(lambda: system.isfile(path), at=at, what=address, patience=patience):
        return {path: ask(lambda: system.info(path), at=at, what=address, patience=patience)}
    if has_magic(path):
        found = ask(lambda: system.glob(path, detail=True), at=at, what=address, patience=patience, long=True)
        return {name: info for name, info in found.items() if info["type"] == "file"}
    found = ask(
        lambda: system.find(path, detail=True) if system.exists(path) else {},
        at=at,
        what=address,
        patience=patience,
        long=True,
    )
    root = f"{path.rstrip('/')}/"
    below = {name.removeprefix(root): (name, info) for name, info in sorted(found.items())}
    read = {n for n in below if suffix_of(n) and not any(part.startswith(".") for part in n.split("/"))}
    if other := [name for name in below if name not in read]:
        logger.info("%s: not read: %s", at, some(other, MAX_NAMED))
    return dict(below[name] for name in below if name in read)


def readable(files: list[Found], at: str) -> list[Found]:
    """The files, or `UserError` for those of another kind than the workflow reads."""
    other = [file.address for file in files if not suffix_of(file.path)]
    if other:
        count = f" and {len(other) - 1} more" if len(other) > 1 else ""
        raise UserError(f"{at}: {other[0]}{count} is none of {READABLE}")
    return files
