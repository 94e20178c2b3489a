"""What an offline run of W&B holds, read from its .wandb file."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK = 32768
LAST_OF_RECORD = (1, 4)  # a record in one piece, or its last one


@dataclass
class LoggedRun:
    """One run: its metrics by step, and its artifacts as {name: digest}."""

    name: str = ""
    job_type: str = ""
    host: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: dict[int, dict[str, Any]] = field(default_factory=dict)
    used: dict[str, str] = field(default_factory=dict)
    made: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)  # of the artifacts
    files: dict[str, list[tuple[str, str, str]]] = field(default_factory=dict)  # their name, hash, address
    copied: list[str] = field(default_factory=list)  # files that are uploaded
    alerts: list[tuple[str, str]] = field(default_factory=list)  # title and text
    group: str = ""
    is_complete: bool = False


def read_runs(directory: Path) -> dict[str, LoggedRun]:
    """The finished offline runs below a wandb directory by name; of several attempts, the last.

    Waits for their last records, which wandb's own process writes after `finish` has returned.
    """
    deadline = time.monotonic() + 300
    while True:
        runs = [read_run(path) for path in sorted(directory.glob("offline-run-*/*.wandb"))]
        if all(run.is_complete for run in runs) or time.monotonic() > deadline:
            return {run.name: run for run in runs if run.is_complete}
        time.sleep(0.05)


def read_run(path: Path) -> LoggedRun:
    run = LoggedRun()
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.name, run.job_type = record.run.display_name, record.run.job_type
            run.host, run.group = record.run.host, record.run.run_group
            run.config = {i.key: json.loads(i.value_json) for i in record.run.config.update}
        elif kind == "history":
            row = run.history.setdefault(record.history.step.num, {})
            row |= {".".join(i.nested_key) or i.key: _value(i) for i in record.history.item}
        elif kind == "artifact":
            artifact = record.artifact
            (run.used if artifact.use_after_commit else run.made)[artifact.name] = artifact.digest
            run.kinds[artifact.name] = artifact.type
            contents = artifact.manifest.contents
            run.files[artifact.name] = sorted((e.path, e.digest, e.ref) for e in contents)
            run.copied += [entry.local_path for entry in contents if entry.local_path]
        elif kind == "alert":
            run.alerts.append((record.alert.title, record.alert.text))
        elif kind == "exit":
            run.is_complete = True
    return run


def _value(item: Any) -> Any:
    if item.value_json:
        return json.loads(item.value_json)
    return getattr(item, item.WhichOneof("value"))


def _records(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log, whose blocks hold pieces of (checksum, length, kind, bytes)."""
    assert data.startswith(b":W&B")
    position, record = 7, b""
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if position + 7 + length > len(data):
            return  # the last record is half written
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in LAST_OF_RECORD:
            yield record
            record = b""
