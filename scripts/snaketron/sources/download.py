"""Fetches files that lie elsewhere, however often the connection breaks, and keeps only what is verified.

The loop of retries is written by hand: with `tenacity` it has 64 lines instead of 48, because a byte that
comes starts the count again and a server may say how long to wait.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from snaketron import files
from snaketron.files import partial
from snaketron.lineage.record import Entry, Record, making
from snaketron.log import NO_SPACE, UserError, logger
from snaketron.sources.patience import Patience
from snaketron.sources.streams import BLOCK, Broken, Changed, OtherSize, open_stream
from snaketron.wording import size_text

_REPORT = 10.0  # seconds between two lines of progress


def download(
    address: str, *, output: Path, size: int, sha256: str, record: Path, name: str, patience: Patience
) -> Record:
    """Fetch a file of the lock to `output`, and write its lineage record after it; return the record.

    An earlier attempt left its bytes in a partial file; only the rest is asked for. A file that turns out
    wrong is fetched once more from its beginning. Raises `UserError` if it is wrong again.
    """
    started = time.monotonic()
    output.parent.mkdir(parents=True, exist_ok=True)
    with _partial(output) as file:
        resumed_at = os.fstat(file.fileno()).st_size
        # Another process may have made it while this one waited: Snakemake deletes older outputs.
        if _is(output, size, sha256):
            output.replace(partial(output))
        else:
            _complete_or_again(file, output, address, size, sha256, patience)
        os.fsync(file.fileno())
        partial(output).replace(output)
    with making("raw", name, outputs={}, record=record, started=started) as job:
        job.inputs = {"address": Entry("address", address, sha256)}
        job.present = [Entry(output.name, str(output), sha256, size)]
        job.counts = {"bytes": size, "resumed_at": resumed_at}
    return job.record


def _is(path: Path, size: int, sha256: str) -> bool:
    return path.is_file() and path.stat().st_size == size and files.sha256(path) == sha256


def _complete_or_again(
    file: IO[bytes], output: Path, address: str, size: int, sha256: str, patience: Patience
) -> None:
    failed: set[type[Changed]] = set()
    while True:
        try:
            return _complete(file, address, size, sha256, patience)
        except Changed as error:
            if type(error) in failed:
                partial(output).unlink()
                raise UserError(
                    f"{address}: the file has changed since it was locked ({error}); list it again with "
                    "`python scripts/lock_sources.py --update` and your --configfile, or restore it there"
                ) from None
            failed.add(type(error))
            if isinstance(error, OtherSize):
                logger.warning("%s: %s; asking once more", address, error)
            else:
                logger.warning("%s: %s; fetching it once more from its beginning", address, error)
                file.truncate(0)
            time.sleep(patience.first_pause)
        except OSError as error:
            if error.errno in NO_SPACE and not error.filename:
                error.filename = str(output)  # a failed write does not say of which file
            raise


def _complete(file: IO[bytes], address: str, size: int, sha256: str, patience: Patience) -> None:
    """Append to `file` what it lacks; `Changed` if the result is not what the lock file lists."""
    start = os.fstat(file.fileno()).st_size
    if start > size:
        raise Changed(f"{size_text(start)} of an earlier attempt are here, and the lock file says {size}")
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(BLOCK):
        digest.update(block)
    if start:
        logger.info("%s: %s of %s are here from an earlier attempt", address, *map(size_text, (start, size)))

    def write(block: bytes) -> None:
        file.write(block)
        digest.update(block)

    if start < size:
        fetch(address, write, start=start, size=size, patience=patience)
        file.flush()
    if digest.hexdigest() != sha256:
        raise Changed(f"its SHA-256 is {digest.hexdigest()} and the lock file says {sha256}")


@contextlib.contextmanager
def _partial(output: Path) -> Iterator[IO[bytes]]:
    """Open the partial file of `output`, alone, to append; an empty one is removed in the end."""
    path = partial(output)
    with files.owned(path) as file:
        try:
            yield file
        finally:
            with contextlib.suppress(FileNotFoundError):
                file.flush()
                if path.stat().st_size == 0:
                    path.unlink()


class Fetched(NamedTuple):
    """A file that has come."""

    size: int
    etag: str | None


def fetch(
    address: str,
    write: Callable[[bytes], object],
    *,
    start: int = 0,
    size: int | None = None,
    patience: Patience,
    quiet: bool = False,
) -> Fetched:
    """Give `write` the bytes of a file from `start` on, each once and in order; return what it is then.

    A connection that breaks is opened again where it ended. A `quiet` transfer does not say that it has
    ended. Raises `Changed` when the file is not `size` bytes long, and `UserError` when it is not there or
    `patience` ends.
    """
    at, failures, progress = start, 0, _Progress(address, start)
    while True:
        before = at
        try:
            stream = open_stream(address, at, patience.stall_timeout)
            with contextlib.closing(stream.blocks):  # type: ignore[type-var]
                if size is not None and stream.size not in (None, size):
                    raise OtherSize(f"it is {stream.size} bytes long and the lock file says {size}")
                for block in stream.blocks:
                    if size is not None and at + len(block) > size:
                        raise Changed(f"it is longer than the {size} bytes of the lock file")
                    write(block)
                    at += len(block)
                    progress.report(at, size or stream.size)
            expected = stream.size if size is None else size
            if expected in (None, at):
                if not quiet:
                    progress.end(at)
                return Fetched(at, stream.etag)
            raise Broken(f"the connection ended after {at} of {expected} bytes")
        except Broken as error:
            failures = 1 if at > before else failures + 1
            if failures > patience.retries:
                raise UserError(
                    f"{address}: {error}; {failures} attempts brought nothing after byte {at}. "
                    "Run again to go on from there"
                ) from None
            patience.wait(address, error, failures)


class _Progress:
    """Says from time to time how far a transfer is, and how fast."""

    def __init__(self, address: str, start: int) -> None:
        self.address = address
        self.began, self.start = time.monotonic(), start
        self.last, self.last_at = self.began, start

    def report(self, at: int, size: int | None) -> None:
        now = time.monotonic()
        if now - self.last < _REPORT:
            return
        speed = (at - self.last_at) / (now - self.last)
        of = f" of {size_text(size)}" if size else ""
        logger.info("%s: %s%s, %.1f MB/s", self.address, size_text(at), of, speed / 1e6)
        self.last, self.last_at = now, at

    def end(self, at: int) -> None:
        seconds = time.monotonic() - self.began
        fetched = at - self.start
        logger.info(
            "%s: fetched %s in %.1f s, %.1f MB/s",
            *(self.address, size_text(fetched), seconds, fetched / 1e6 / max(seconds, 1e-3)),
        )
