"""The part of the Hugging Face hub's interface by which its clients list and fetch data sets and models."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.faulty_server import FaultyServer, _Handler

LARGE = (".parquet", ".gz", ".zst", ".arrow", ".safetensors")  # in LFS, where the hub knows the SHA-256


class FakeHub(FaultyServer):
    """Data sets and models by name, and of each the files of its commits; branches point to commits."""

    def __init__(self) -> None:
        super().__init__()
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.gated: set[str] = set()
        hub = self

        class Handler(_HubHandler):
            faulty = hub

        self.server.RequestHandlerClass = Handler

    def commit(self, repository: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Make `files` the content of a branch; the commit."""
        content = json.dumps({path: hashlib.sha1(data).hexdigest() for path, data in files.items()})
        commit = hashlib.sha1(f"{repository} {content}".encode()).hexdigest()
        self.commits.setdefault(repository, {})[commit] = files
        self.branches.setdefault(repository, {})[branch] = commit
        return commit

    def store(self, content: bytes) -> str:
        """The path at which a large file is kept, where its address leads."""
        path = f"/store/{hashlib.sha256(content).hexdigest()}"
        self.files[path] = content
        return path

    def environment(self, cache: Any) -> dict[str, str]:
        """What the clients need to ask this hub and nobody else."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "NO_PROXY": "127.0.0.1",
            "HF_HUB_OFFLINE": "0",
        }


def _file(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data)}
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


class _HubHandler(_Handler):
    faulty: FakeHub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(
            r"/api/(?:datasets|models)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?", path
        ):
            self.api(*found.groups())
        elif found := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(*found.groups())
        else:
            super().do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        path = unquote(urlsplit(self.path).path)
        found = re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)/paths-info/([^/]+)", path)
        if not found:
            return self.answer(404)
        files = self.files_of(*found.groups())
        if files is not None:
            paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
            self.json([_file(path, files[1][path]) for path in paths if path in files[1]])

    def files_of(self, repository: str, revision: str | None) -> tuple[str, dict[str, bytes]] | None:
        """The commit and the files of a revision; None when this has answered why not."""
        hub = self.faulty
        if repository not in hub.commits:
            return self.error(401, "RepoNotFound", "Repository Not Found")
        if repository in hub.gated and not self.headers.get("Authorization"):
            return self.error(401, "GatedRepo", "Access to it is restricted")
        revision = revision or "main"
        commit = hub.branches[repository].get(revision, revision)
        if commit not in hub.commits[repository]:
            return self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, hub.commits[repository][commit]

    def error(self, status: int, code: str, message: str) -> None:
        self.answer(status, {"X-Error-Code": code, "X-Error-Message": message})

    def json(self, value: Any) -> None:
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def api(self, repository: str, what: str | None, revision: str | None, below: str | None) -> None:
        found = self.files_of(repository, revision)
        if found is None:
            return
        commit, files = found
        if what != "tree":
            siblings = [{"rfilename": path} for path in files]
            self.json({"id": repository, "sha": commit, "siblings": siblings, "private": False, "tags": []})
            return
        prefix = f"{below}/" if below else ""
        inside = {p: d for p, d in files.items() if p.startswith(prefix)}
        if below and not inside:
            self.error(404, "EntryNotFound", f"{below} does not exist on {revision}")
            return
        deep = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
        entries: dict[str, Any] = {}
        for path, data in inside.items():
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)) if deep else range(1, min(2, len(parts))):
                directory = prefix + "/".join(parts[:depth])
                entries[directory] = {"type": "directory", "path": directory, "size": 0, "oid": "0" * 40}
            if deep or len(parts) == 1:
                entries[path] = _file(path, data)
        self.json(list(entries.values()))

    def resolve(self, repository: str, revision: str, path: str) -> None:
        if (found := self.files_of(repository, revision)) is None:
            return
        commit, files = found
        if path not in files:
            self.error(404, "EntryNotFound", "Entry not found")
            return
        data, digest = files[path], hashlib.sha256(files[path]).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_file(path, data)["oid"]}"'}
        if not path.endswith(LARGE):
            self.answer(200, headers, data)
            return
        linked = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{digest}"'}
        where = f"http://localhost:{self.faulty.port}{self.faulty.store(data)}?X-Amz-Signature=secret"
        self.answer(302, headers | linked | {"Location": where})
