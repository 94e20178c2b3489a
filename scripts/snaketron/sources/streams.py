"""Opens files that lie elsewhere, from any byte on: over HTTP, from the hub and from object stores."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn
from urllib.parse import urlsplit

from snaketron.log import UserError, logger

if TYPE_CHECKING:
    import ssl

    import httpx2

BLOCK = 1 << 20  # bytes of a read at most
TEMPORARY = {408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529}  # HTTP answers worth a retry
_LONGEST_WISH = 600.0  # seconds that a server may ask us to wait
_HUB = re.compile(r"hf://(?P<kind>datasets/|)(?P<repository>[^@/]+/[^@/]+)@(?P<revision>[^/]+)/(?P<path>.+)")
_shared: dict[tuple[str, str], Any] = {}  # file systems, by scheme and host or bucket
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}


class Broken(Exception):
    """The connection failed, ended early or stalled: worth another try, after `pause` seconds if given."""

    def __init__(self, message: str, pause: float | None = None) -> None:
        super().__init__(message)
        self.pause = pause


class Changed(Exception):
    """The file is not the one that the lock file lists."""


class OtherSize(Changed):
    """The server gives another size. Bytes fetched before may be right: error pages have sizes, too."""


class Stream(NamedTuple):
    """A file from some byte on."""

    size: int | None  # bytes of the whole file; None: the server does not tell
    blocks: Iterator[bytes]
    etag: str | None = None  # stays as long as the content; None: the server does not tell


class _Head(NamedTuple):
    """What is known of a file before its blocks come."""

    size: int | None
    etag: str | None = None


def open_stream(address: str, start: int, stall_timeout: float) -> Stream:
    """The file from byte `start` on.

    Raises `Broken` when another try may help, `OtherSize` when the file ends before `start`, and
    `UserError` when no try will help. Reading the blocks raises `Broken` and `UserError`, too.
    """
    if hub := _HUB.fullmatch(address):
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        kind, repository, revision, path = hub.group("kind", "repository", "revision", "path")
        url = hf_hub_url(repository, path, repo_type="dataset" if kind else "model", revision=revision)
        blocks = _read_http(address, url, build_hf_headers(library_name="snaketron"), start, stall_timeout)
    elif address.startswith(("http://", "https://")):
        agent = {"User-Agent": f"snaketron/{importlib.metadata.version('snaketron')}"}
        blocks = _read_http(address, address, agent, start, stall_timeout)
    else:
        blocks = watched(functools.partial(_read_fsspec, address, start), stall_timeout)
    try:
        head: _Head = next(blocks)
        return Stream(head.size, blocks, head.etag)
    except StopIteration:
        raise Broken("nothing came") from None


# ------------------------------------------------------------------------------------------------ HTTP


def _read_http(
    address: str, url: str, headers: dict[str, str], start: int, stall_timeout: float
) -> Iterator[Any]:
    """The head of a file, then its blocks from `start` on, as they are: nothing is decompressed."""
    import httpx2

    asked = headers | {"Accept-Encoding": "identity", "Connection": "close"}  # no second request comes on it
    if start:
        asked["Range"] = f"bytes={start}-"
    options: dict[str, Any] = {"timeout": stall_timeout, "verify": _certificates(), "follow_redirects": True}
    size: int | None = None
    try:
        with httpx2.stream("GET", url, headers=asked, **options) as response:
            begin, size = _place(address, response, start)
            yield _Head(size, _etag(response))
            skip = start - begin
            for block in response.iter_raw():
                if skip < len(block):
                    yield block[skip:]
                skip = max(0, skip - len(block))
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, httpx2.TooManyRedirects) as error:
        raise UserError(f"{address}: {error}") from None
    except httpx2.TimeoutException:
        raise Broken(f"nothing came for {stall_timeout:g} s") from None
    except httpx2.TransportError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise UserError(f"{address}: {error}; SSL_CERT_FILE names the certificates to trust") from None
        if size is None or not isinstance(error, httpx2.RemoteProtocolError):
            raise Broken(f"{type(error).__name__}: {error}") from None
        # The connection ended before `size` bytes came: the reader sees that, and says where.


@functools.cache
def _certificates() -> ssl.SSLContext:
    import httpx2

    context = httpx2.create_ssl_context()
    if "SSL_CERT_FILE" not in os.environ:
        with contextlib.suppress(ImportError):  # images without the system's certificates
            import certifi

            context.load_verify_locations(certifi.where())
    return context


def _place(address: str, response: httpx2.Response, start: int) -> tuple[int, int | None]:
    """At which byte an answer begins, `start` or before, and the size of the whole file if it is told."""
    if not response.is_success:
        _refused(address, response)
    length = response.headers.get("Content-Length")
    begin, size = 0, int(length) if length else None
    if response.status_code == 206:
        given = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if not given or int(given[1]) > start:
            raise Broken(f"the server sent another range than bytes={start}-")
        begin, size = int(given[1]), None if given[2] == "*" else int(given[2])
    if begin < start:
        logger.info("%s: the server cannot go on from byte %d; reading up to it again", address, start)
    return begin, size


def _etag(response: httpx2.Response) -> str | None:
    """What changes with the content: a strong entity tag, or the time of the last change."""
    tag = response.headers.get("ETag", "")
    if tag and not tag.startswith("W/"):
        return str(tag).strip('"')
    return response.headers.get("Last-Modified")


def _refused(address: str, response: httpx2.Response) -> NoReturn:
    """Say what a server's refusal means."""
    code = response.status_code
    answer = f"the server answered {code} {response.reason_phrase}"
    if code == 416:
        raise OtherSize("the file is shorter than the lock file says")
    if code in TEMPORARY:
        raise Broken(answer, _wish(response.headers.get("Retry-After")))
    if code in (401, 403):
        token = "set HF_TOKEN to the token of an account that was given access"
        what = token if address.startswith("hf://") else "ask for access"
        raise UserError(f"{address}: {answer}; {what}")
    raise UserError(f"{address}: {answer}; check the address, or list the source again")


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


# ---------------------------------------------------------------------------------- other file systems


def filesystem(address: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path there.

    Threads share a file system that has a loop of its own (S3, GCS, Azure): another would cost a client and a
    new connection for each file.
    """
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    scheme = address.partition("://")[0]
    host = urlsplit(address)[:2]
    if host in _shared:
        return _shared[host], _shared[host]._strip_protocol(address)
    try:
        system, path = url_to_fs(address)
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
    if getattr(system, "async_impl", False):
        _shared[host] = system
    return system, path


def _read_fsspec(address: str, start: int) -> Iterator[Any]:
    """The head of a file, then its blocks from `start` on."""
    try:
        system, path = filesystem(address)
        with system.open(path, "rb", block_size=8 * BLOCK) as file:
            yield _Head(file.size if getattr(file, "size", None) is not None else system.size(path))
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
    """Yield what `read` yields. It runs in a thread, so that a read that hangs can be given up (`Broken`)."""
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
