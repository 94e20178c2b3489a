"""An HTTP server on this machine that breaks connections as real ones do, and remembers what it was asked."""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote


@dataclass
class Fault:
    """What goes wrong with one answer."""

    kind: str  # drop, stall, wait, short, ignore_range, early_range, strange_range, status, content
    after: int = 0  # bytes of the answer's body that are sent before
    status: int = 0
    retry_after: str = ""
    content: bytes = b""


@dataclass
class Request:
    """What was asked."""

    method: str
    path: str
    start: int  # of its Range
    authorization: str | None


class FaultyServer:
    """Serves `files`, by path; the next answer for a path has the first of its `faults`."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.redirects: dict[str, str] = {}
        self.requests: list[Request] = []
        self.over = threading.Event()
        self.go_on = threading.Event()  # for answers that wait in the middle
        server = self

        class Handler(_Handler):
            faulty = server

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()

    def put(self, path: str, content: bytes, *faults: Fault) -> str:
        """Serve a file whose first answers are faulty; its address."""
        self.files[path] = content
        self.faults[path] = list(faults)
        return self.url + path

    def starts(self, path: str) -> list[int]:
        """From which byte on a file was asked for, each time."""
        return [r.start for r in self.requests if r.path == path and r.method == "GET"]


class _Handler(BaseHTTPRequestHandler):
    faulty: FaultyServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, path = self.faulty, unquote(self.path.partition("?")[0])
        given = re.fullmatch(r"bytes=(\d+)-\d*", self.headers.get("Range", ""))
        start = int(given[1]) if given else 0
        server.requests.append(Request(self.command, path, start, self.headers.get("Authorization")))
        if path in server.redirects:
            self.answer(302, {"Location": server.redirects[path]})
            return
        if path not in server.files:
            self.answer(404)
            return
        fault = server.faults[path].pop(0) if server.faults.get(path) else Fault("none")
        if fault.kind == "status":
            self.answer(fault.status, {"Retry-After": fault.retry_after} if fault.retry_after else {})
            return
        content = fault.content if fault.kind == "content" else server.files[path]
        self.send(content, start, fault)

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send(self, content: bytes, start: int, fault: Fault) -> None:
        if start > len(content) or (start and start == len(content)):
            self.answer(416, {"Content-Range": f"bytes */{len(content)}"})
            return
        if fault.kind == "ignore_range":
            start = 0
        elif fault.kind == "early_range":
            start //= 2
        elif fault.kind == "strange_range":
            start += 1
        body = content[start:]
        length = fault.after if fault.kind == "short" else len(body)
        headers = {"Content-Length": str(length), "ETag": f'"{hashlib.md5(content).hexdigest()}"'}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send_response(206 if start else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        rest = body[fault.after :] if fault.kind == "wait" else b""
        if fault.kind in ("drop", "stall", "short", "wait"):
            body = body[: fault.after]
        try:
            self.wfile.write(body)
            if rest:
                self.faulty.go_on.wait(60)
                self.wfile.write(rest)
        except OSError:  # the client has gone
            self.close_connection = True
            return
        if fault.kind == "stall":
            self.faulty.over.wait()
        if fault.kind in ("drop", "stall"):
            self.close_connection = True
