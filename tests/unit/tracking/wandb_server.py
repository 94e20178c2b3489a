"""A small server that speaks as much of W&B's protocol as a run with artifacts needs."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Behaviour = Literal["accept", "refuse", "stall"]


@dataclass
class Server:
    """What the server does, and what it was sent."""

    behaviour: Behaviour = "accept"
    address: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)  # of the history
    alerts: list[str] = field(default_factory=list)  # titles
    artifacts: set[tuple[str, str]] = field(default_factory=set)  # (made or used, name)
    groups: set[str | None] = field(default_factory=set)
    exit_codes: list[int] = field(default_factory=list)
    requests: int = 0
    over: threading.Event = field(default_factory=threading.Event)

    def answer(self, operation: str, values: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL operation."""
        match operation:
            case "Viewer":
                return {
                    "viewer": {
                        "id": "1",
                        "entity": "me",
                        "username": "me",
                        "flags": "{}",
                        "teams": {"edges": []},
                    }
                }
            case "RunResumeStatus":
                return {
                    "model": self.project() | {"bucket": self.bucket(values["name"])} if self.rows else None
                }
            case "UpsertBucket":
                self.groups.add(values["groupName"])
                bucket = self.bucket(values["name"]) | {"project": self.project()}
                return {"upsertBucket": {"bucket": bucket, "inserted": not self.rows}}
            case "NotifyScriptableRunAlert":
                self.alerts.append(values["title"])
                return {"notifyScriptableRunAlert": {"success": True}}
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": f"{self.address}/file"} for name in values["files"]]
                return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
            case "CreateArtifact":
                name = values["input"]["artifactCollectionName"]
                self.artifacts.add(("made", name))
                last = {"latestArtifact": {"id": name}}
                return {
                    "createArtifact": {
                        "artifact": {"id": name, "state": "COMMITTED", "artifactSequence": last}
                    }
                }
            case "UseArtifact":
                name = values["input"]["artifactID"]
                self.artifacts = self.artifacts - {("made", name)} | {("used", name)}
                return {"useArtifact": {"artifact": {"id": name}}}
            case "ArtifactType":
                return {"project": {"artifact": None}}
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
        return {}

    def project(self) -> dict[str, Any]:
        return {"id": "1", "name": "snaketron", "entity": {"id": "1", "name": "me"}}

    def bucket(self, name: str) -> dict[str, Any]:
        values = {"description": None, "config": "{}", "sweepName": None, "historyLineCount": len(self.rows)}
        tail = json.dumps([json.dumps(row) for row in self.rows[-1:]])
        more = {
            "summaryMetrics": "{}",
            "logLineCount": 0,
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "wandbConfig": '{"t": 1}',
        }
        return {
            "id": "1",
            "name": name,
            "displayName": name,
            "historyTail": tail,
            "tags": [],
            **values,
            **more,
        }

    def stream(self, sent: dict[str, Any]) -> None:
        """A part of the run's files."""
        lines = sent.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        self.rows += map(json.loads, lines)
        if sent.get("complete"):
            self.exit_codes.append(sent["exitcode"])


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    of: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.of.requests += 1
        if self.of.behaviour == "stall":
            self.of.over.wait()
        if self.of.behaviour != "accept":
            return self.reply({"errors": [{"message": "invalid API key"}]}, 401)
        if self.headers["Content-Encoding"] == "gzip":
            body = gzip.decompress(body)
        if self.path.endswith("/file_stream"):
            self.of.stream(json.loads(body))
        if self.path != "/graphql":
            return self.reply({})
        sent = json.loads(body)
        operation = re.search(r"(?:query|mutation)\s+(\w+)", sent["query"])
        assert operation
        return self.reply({"data": self.of.answer(operation[1], sent.get("variables") or {})})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.reply({})

    def reply(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        with contextlib.suppress(ConnectionError):  # the client has given up
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serving(behaviour: Behaviour = "accept") -> Iterator[Server]:
    found = Server(behaviour)
    http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"of": found}))
    http.daemon_threads = True
    found.address = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    try:
        yield found
    finally:
        found.over.set()
        http.shutdown()
        http.server_close()
        thread.join()
