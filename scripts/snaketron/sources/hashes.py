"""Hashes of files that lie elsewhere: many are read at a time, and none again that has not changed."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from typing import NamedTuple
from urllib.parse import urlsplit

from snaketron import files
from snaketron.log import UserError, logger
from snaketron.sources.addresses import Found
from snaketron.sources.download import fetch
from snaketron.sources.formats import suffix_of
from snaketron.sources.kinds import START, check_content
from snaketron.sources.lockfile import Lock
from snaketron.sources.patience import Patience, ask
from snaketron.sources.streams import Changed, open_stream
from snaketron.wording import plural, size_text

_AT_A_TIME = 16  # files that are read at a time: small ones wait for answers, and not for the line
_REPORT = 10.0  # seconds between two lines of progress
_GZIP = b"\x1f\x8b"


class _Hash(NamedTuple):
    size: int
    sha256: str
    compressed: bool  # with gzip, although the name does not say so


class Known:
    """Hashes of files that were read: those of the lock file, and those of a run that was interrupted.

    They are found by location and entity tag. A file without a tag is read again. What is read is kept in a
    file beside the lock file, a line each, until `forget`.
    """

    def __init__(self, lock: Lock) -> None:
        self.path = lock.path.with_name(f".{lock.path.name}.hashes")
        self.locations: set[str] = set()
        self._hashes: dict[tuple[str, str], _Hash] = {}
        for entry in (*lock.sources.values(), *lock.models.values()):
            for file in entry["files"]:
                if file.get("etag"):
                    found = Found(file["address"], "", etag=file["etag"])
                    path = urlsplit(found.address).path if found.address.startswith("http") else found.address
                    compressed = suffix_of(file["name"]) != suffix_of(path)
                    self._remember(found, _Hash(file["size"], file["sha256"], compressed))
        for line in self.path.read_bytes().splitlines() if self.path.exists() else ():
            try:
                address, etag, *hashed = json.loads(line)
                self._remember(Found(address, "", etag=etag), _Hash(*hashed))
            except (ValueError, TypeError):
                logger.warning("%s: a line of it was cut off; the file is read again", self.path)

    def _remember(self, file: Found, hashed: _Hash) -> None:
        assert file.etag is not None
        self.locations.add(file.location)
        self._hashes[file.location, file.etag] = hashed

    def of(self, file: Found) -> Found | None:
        """The file with its hash, if it is known and neither size nor tag is another."""
        hashed = self._hashes.get((file.location, file.etag)) if file.etag else None
        if hashed is None or file.size not in (None, hashed.size):
            return None
        return _with(file, hashed)

    def keep(self, file: Found, path: str) -> None:
        """Remember the hash of a file that was read, `path` being its path at its service."""
        if file.etag and file.size is not None and file.sha256:
            hashed = _Hash(file.size, file.sha256, file.path != path)
            self._remember(file, hashed)
            with files.owned(self.path) as kept:
                kept.write(json.dumps([file.address, file.etag, *hashed]).encode() + b"\n")

    def forget(self) -> None:
        """The lock file has them all."""
        self.path.unlink(missing_ok=True)


def _with(file: Found, hashed: _Hash) -> Found:
    path = f"{file.path}.gz" if hashed.compressed else file.path
    return replace(file, size=hashed.size, sha256=hashed.sha256, path=path)


def hash_files(name: str, found: list[Found], known: Known, patience: Patience) -> list[Found]:
    """The files of source `name` with sizes and hashes, in their order; read where no hash is told."""
    whole = {file: known.of(file) if file.sha256 is None else file for file in found}
    missing = [file for file, hashed in whole.items() if hashed is None]
    if not missing:
        return [file for file in whole.values() if file]
    of = f", {size_text(size)}" if (size := sum(file.size or 0 for file in missing)) else ""
    logger.info(
        "%s: reading %s%s for hashes that their services do not tell", name, plural(len(missing), "file"), of
    )
    count = size = 0
    told = time.monotonic()
    with ThreadPool(_AT_A_TIME) as pool:  # of daemons, so nothing waits for a read that hangs at the end
        for file, hashed in pool.imap_unordered(lambda file: (file, _read(file, known, patience)), missing):
            whole[file] = hashed
            known.keep(hashed, file.path)
            count, size = count + 1, size + (hashed.size or 0)
            if time.monotonic() - told > _REPORT:
                told = time.monotonic()
                logger.info("%s: %d of %d files read, %s", name, count, len(missing), size_text(size))
    return [file for file in whole.values() if file]


def _read(file: Found, known: Known, patience: Patience) -> Found:
    """Read a file for its hash, unless its tag, which only reading tells, is known."""
    if file.etag is None and file.location in known.locations:
        tagged = replace(
            file, etag=ask(lambda: _tag(file, patience), at=file.address, what="", patience=patience)
        )
        if hashed := known.of(tagged):
            return hashed
    digest, begin = hashlib.sha256(), bytearray()

    def take(block: bytes) -> None:
        digest.update(block)
        if len(begin) < START:
            begin.extend(block[:START])

    try:
        head = fetch(file.address, take, size=file.size, patience=patience, quiet=True)
    except Changed:
        raise UserError(
            f"{file.address}: what comes has not the size that its service lists; if it is stored with "
            "Content-Encoding: gzip, store it without, else list it again"
        ) from None
    if suffix_of(file.path):
        check_content(file.address, bytes(begin))
    read = _Hash(head.size, digest.hexdigest(), _compressed(file, bytes(begin)))
    return _with(replace(file, etag=file.etag or head.etag), read)


def _tag(file: Found, patience: Patience) -> str | None:
    stream = open_stream(file.address, 0, patience.stall_timeout)
    stream.blocks.close()  # type: ignore[attr-defined]
    return stream.etag


def _compressed(file: Found, begin: bytes) -> bool:
    """Whether a file is stored compressed although its name does not say so (Content-Encoding: gzip).

    It is kept as it is stored and gets a name that ends in .gz, so its reader decompresses it, once.
    """
    suffix = suffix_of(file.path)
    if not begin.startswith(_GZIP) or suffix.endswith(".gz"):
        return False
    if suffix not in (".jsonl", ".ndjson", ".json"):
        raise UserError(
            f"{file.address}: it is stored compressed with gzip (Content-Encoding), and a {suffix} file "
            "cannot be read so; store it without"
        )
    return True
