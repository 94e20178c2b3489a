"""Reads files that lie elsewhere, however often the connection breaks, and keeps only what is verified."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.client
import importlib.metadata
import os
import queue
import random
import re
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

from snaketron import files
from snaketron.files import partial, write_json
from snaketron.lineage import record as lineage
from snaketron.log import NO_SPACE, UserError, logger
from snaketron.sources.shards import size_text

BLOCK = 1 << 20  # bytes of a read at most
_TEMPORARY = {408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529}  # HTTP answers worth a retry
_LONGEST_PAUSE = 60.0  # seconds
_LONGEST_WISH = 600.0  # seconds that a server may ask us to wait
_REPORT = 10.0  # seconds between two lines of progress
_HUB = re.compile(r"hf://datasets/(?P<repository>[^@]+)@(?P<revision>[^/]+)/(?P<path>.+)")
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


@dataclass(frozen=True)
class Patience:
    """How long a transfer is tried for."""

    retries: int = 8  # in a row that bring no byte
    stall_timeout: float = 60  # seconds without a byte after which a connection is given up
    first_pause: float = 1.0  # seconds before a retry; doubled each time, up to a minute


class Broken(Exception):
    """The connection failed, ended early or stalled: worth another try, after `pause` seconds if given."""

    def __init__(self, message: str, pause: float | None = None) -> None:
        super().__init__(message)
        self.pause = pause


class Changed(Exception):
    """The file is not the one that the lock file lists."""


class OtherSize(Changed):
    """The server says so. What was fetched before may be right: error pages come with sizes, too."""


class Stream(NamedTuple):
    """A file from some byte on."""

    size: int | None  # bytes of the whole file, if the other side says so
    blocks: Iterator[bytes]


# -------------------------------------------------------------------------------------------- download


def download(
    address: str, *, output: Path, size: int, sha256: str, record: Path, name: str, patience: Patience
) -> dict[str, Any]:
    """Fetch a file of the lock to `output`, and write its lineage record after it; return the record.

    What is there of an earlier attempt is kept in a partial file, and the rest asked for. What turns out
    wrong is fetched once more from the beginning; if that is wrong as well, `UserError`.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with _partial(output) as file:
        resumed_at = os.fstat(file.fileno()).st_size
        if _is(output, size, sha256):  # Snakemake deletes outputs: it is of a process that we waited for
            output.replace(partial(output))
        else:
            _complete_or_again(file, output, address, size, sha256, patience)
        os.fsync(file.fileno())
        value = lineage.record(
            "raw",
            name,
            inputs=[{"path": address, "sha256": sha256}],
            outputs={output: partial(output)},
            settings={},
            counts={"bytes": size, "resumed_at": resumed_at},
        )
        partial(output).replace(output)
    write_json(record, value)
    return value


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
    """What there is of a file, which no other process is writing; nothing is left where nothing came."""
    path = partial(output)
    with files.owned(path) as file:
        try:
            yield file
        finally:
            with contextlib.suppress(FileNotFoundError):
                file.flush()
                if path.stat().st_size == 0:
                    path.unlink()


def fetch(
    address: str,
    write: Callable[[bytes], object],
    *,
    start: int = 0,
    size: int | None = None,
    patience: Patience,
) -> int:
    """Pass the bytes of a file from `start` on to `write`, each once and in order; return the file's size.

    A connection that breaks is opened again where it ended. Raises `Changed` when the file is not `size`
    bytes long, and `UserError` when it is not there or `patience` ends.
    """
    at, failures, progress = start, 0, _Progress(address, start)
    while True:
        before = at
        try:
            stream = _open(address, at, patience.stall_timeout)
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
                progress.end(at)
                return at
            raise Broken(f"the connection ended after {at} of {expected} bytes")
        except Broken as error:
            failures = 1 if at > before else failures + 1
            if failures > patience.retries:
                raise UserError(
                    f"{address}: {error}; {failures} attempts brought nothing after byte {at}. "
                    "Run again to go on from there"
                ) from None
            pause = min(_LONGEST_PAUSE, patience.first_pause * 2 ** (failures - 1))
            pause = error.pause or pause * random.uniform(0.5, 1)  # many downloads must not return at once
            logger.warning(
                "%s: %s; trying again in %.1f s (%d of %d)",
                *(address, error, pause, failures, patience.retries),
            )
            time.sleep(pause)


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


# --------------------------------------------------------------------------------------------- streams


def _open(address: str, start: int, stall_timeout: float) -> Stream:
    """The file from byte `start` on. Here and while it is read: `Broken`, or `UserError` if hopeless."""
    if hub := _HUB.fullmatch(address):
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        repository, revision, path = hub.group("repository", "revision", "path")
        url = hf_hub_url(repository, path, repo_type="dataset", revision=revision)
        return _open_http(address, url, build_hf_headers(library_name="snaketron"), start, stall_timeout)
    if address.startswith(("http://", "https://")):
        agent = {"User-Agent": f"snaketron/{importlib.metadata.version('snaketron')}"}
        return _open_http(address, address, agent, start, stall_timeout)
    blocks = watched(functools.partial(_read_fsspec, address, start), stall_timeout)
    try:
        return Stream(next(blocks), blocks)
    except StopIteration:
        raise Broken("nothing came") from None


class _Redirect(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and tells a token to no other server than the one that it is for."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request and (request.type, request.host) != (req.type, req.host):
            request.remove_header("Authorization")
        return request


@functools.cache
def _opener() -> urllib.request.OpenerDirector:
    context = ssl.create_default_context()
    if "SSL_CERT_FILE" not in os.environ:
        with contextlib.suppress(ImportError):  # images without the system's certificates
            import certifi

            context.load_verify_locations(certifi.where())
    return urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), _Redirect())


def _open_http(address: str, url: str, headers: dict[str, str], start: int, stall_timeout: float) -> Stream:
    """Ask a server for the bytes from `start` on; one that begins elsewhere is read up to there."""
    url = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")  # what is quoted already stays
    asked = {name.title(): value for name, value in headers.items()} | {"Accept-Encoding": "identity"}
    if start:
        asked["Range"] = f"bytes={start}-"
    try:
        response = _opener().open(urllib.request.Request(url, headers=asked), timeout=stall_timeout)
    except urllib.error.HTTPError as error:
        with error:
            _refused(address, error)
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise UserError(
                f"{address}: {error.reason}; SSL_CERT_FILE names the certificates to trust"
            ) from None
        raise Broken(_why(error.reason, stall_timeout)) from None
    except http.client.InvalidURL as error:
        raise UserError(f"{address}: {error}") from None
    except (OSError, http.client.HTTPException) as error:
        raise Broken(_why(error, stall_timeout)) from None
    begin, size = 0, response.length
    if response.status == 206:
        given = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if not given or int(given[1]) > start:
            response.close()
            raise Broken(f"the server sent another range than bytes={start}-")
        begin, size = int(given[1]), None if given[2] == "*" else int(given[2])
    if begin < start:
        logger.info("%s: the server cannot go on from byte %d; reading up to it again", address, start)
    return Stream(size, _read_http(response, start - begin, stall_timeout))


def _read_http(response: http.client.HTTPResponse, skip: int, stall_timeout: float) -> Iterator[bytes]:
    """The rest of an answer after its first `skip` bytes."""
    with response:
        while True:
            try:
                block = response.read1(BLOCK)
            except (OSError, http.client.HTTPException) as error:
                raise Broken(_why(error, stall_timeout)) from None
            if not block:
                return
            if skip < len(block):
                yield block[skip:]
            skip = max(0, skip - len(block))


def _why(error: object, stall_timeout: float) -> str:
    if isinstance(error, TimeoutError):
        return f"nothing came for {stall_timeout:g} s"
    return f"{type(error).__name__}: {error}" if isinstance(error, Exception) else str(error)


def _refused(address: str, error: urllib.error.HTTPError) -> NoReturn:
    """Say what a server's refusal means."""
    answer = f"the server answered {error.code} {error.reason}"
    if error.code == 416:
        raise OtherSize("the file is shorter than the lock file says") from None
    if error.code in _TEMPORARY:
        raise Broken(answer, _wish(error.headers.get("Retry-After"))) from None
    if error.code in (401, 403):
        token = "set HF_TOKEN to the token of an account that was given access"
        what = token if address.startswith("hf://") else "ask for access"
        raise UserError(f"{address}: {answer}; {what}") from None
    raise UserError(f"{address}: {answer}; check the address, or list the source again") from None


def _wish(retry_after: str | None) -> float | None:
    """Seconds that a server asks us to wait, by number or by date."""
    if not retry_after:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), _LONGEST_WISH)


def filesystem(address: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path there."""
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    scheme = address.partition("://")[0]
    try:
        return url_to_fs(address)
    except ImportError as error:
        extra = _EXTRAS.get(scheme)
        what = f"install the extra with `uv sync --extra {extra}`" if extra else "install it"
        raise UserError(
            f"{address}: {scheme}:// needs a package that is not here ({error}); {what}"
        ) from None
    except ValueError as error:
        if scheme in known_implementations:
            raise UserError(f"{address}: {error}") from None
        raise UserError(
            f"{address}: {scheme}:// is unknown; known are s3, gs, hf, https and others of fsspec"
        ) from None


def _read_fsspec(address: str, start: int) -> Iterator[Any]:
    """The size of a file, then its blocks from `start` on."""
    try:
        system, path = filesystem(address)
        with system.open(path, "rb", block_size=8 * BLOCK) as file:
            yield file.size if getattr(file, "size", None) is not None else system.size(path)
            file.seek(start)
            while block := file.read(8 * BLOCK):
                yield block
    except (UserError, GeneratorExit):
        raise
    except FileNotFoundError:
        raise UserError(f"{address}: no such file; check the address, or list the source again") from None
    except PermissionError as error:
        raise UserError(f"{address}: no access ({error}); credentials come from the environment") from None
    except Exception as error:  # drivers raise what their clients raise
        if "Credentials" in type(error).__name__:
            raise UserError(f"{address}: {error}; credentials come from the environment") from None
        raise Broken(f"{type(error).__name__}: {error}") from None


def watched(read: Callable[[], Iterator[Any]], stall_timeout: float) -> Iterator[Any]:
    """What `read` yields, from a thread of its own, so that a read that hangs can be given up (`Broken`)."""
    items: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=2)
    over = threading.Event()
    end = object()

    def put(item: tuple[bool, Any]) -> None:
        while not over.is_set():
            with contextlib.suppress(queue.Full):
                return items.put(item, timeout=0.5)

    def work() -> None:
        try:
            with contextlib.closing(read()) as blocks:  # type: ignore[type-var]
                for block in blocks:
                    put((True, block))
                    if over.is_set():
                        return
            put((True, end))
        except BaseException as error:
            put((False, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            try:
                fine, item = items.get(timeout=stall_timeout)
            except queue.Empty:
                raise Broken(f"nothing came for {stall_timeout:g} s") from None
            if not fine:
                raise item
            if item is end:
                return
            yield item
    finally:
        over.set()
