"""Lineage records: what an artifact was made from, with which settings and versions, and what came out.

Every rule writes one record beside its outputs, after them, so a record says that they are complete.
Later rules read counts and hashes from it, and W&B artifacts are logged from it.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from snaketron.files import read_json, sha256
from snaketron.log import UserError

_started = time.monotonic()  # the import of this module is the start of the job, to within its imports

_LARGEST_RECORD = 1 << 28  # bytes
PACKAGES = ("snaketron", "datatrove", "tokenizers", "fastokens", "pyarrow", "torch", "megatron-core")


def record(
    kind: str,
    name: str,
    *,
    inputs: Iterable[Path | Mapping[str, Any]],
    outputs: Mapping[Path, Path] | Iterable[Path],
    settings: Mapping[str, Any],
    counts: Mapping[str, Any],
    hashes: Mapping[Path, str] | None = None,
) -> dict[str, Any]:
    """The record of an artifact, to be written with `files.write_json`.

    `inputs` are files, hashed here, or entries `{"path": ..., "sha256": ...}` of other records.
    `outputs` are files, or a mapping from final path to the path where the file lies now.
    `hashes` are the sha256, by final path, of outputs that need not be read again for them.
    `settings` and `counts` are JSON values; `counts` says what went in, came out and was dropped by reason.
    """
    known = hashes or {}
    present = outputs if isinstance(outputs, Mapping) else {path: path for path in outputs}
    return {
        "kind": kind,
        "name": name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - _started, 2),
        "inputs": [
            dict(i) if isinstance(i, Mapping) else {"path": str(i), "sha256": sha256(i)} for i in inputs
        ],
        "outputs": [
            {"path": str(final), "sha256": known.get(final) or sha256(now), "bytes": now.stat().st_size}
            for final, now in present.items()
        ],
        "settings": dict(settings),
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
        "counts": dict(counts),
    }


def read(path: Path) -> dict[str, Any]:
    """Read a record; `UserError` when there is none or it is not one."""
    try:
        value = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such record; the rule that makes it has not finished") from None
    except ValueError as error:
        raise UserError(f"{path}: not a lineage record ({error}); delete it and run again") from None
    if not isinstance(value, dict) or not {"kind", "outputs", "counts"} <= value.keys():
        raise UserError(f"{path}: not a lineage record; delete it and run again")
    return value


def record_of(entry: Mapping[str, Any]) -> Path | None:
    """The record of what made an input, given as a record lists it; None for a file that no rule made.

    A record lies beside what it is about and is known by the content hash, so a file that was made again
    since is not taken for the one that was used.
    """
    path = Path(entry["path"])
    if "version" in entry:  # a checkpoint
        return path / "record.json"
    beside = (path.parent / "record.json", path.with_suffix(".json"), path.with_name(f"{path.name}.json"))
    for candidate in beside:
        try:
            if candidate == path and path.stat().st_size > _LARGEST_RECORD:
                continue  # raw JSON, which may be larger than the memory
            outputs = read(candidate)["outputs"]
        except (UserError, FileNotFoundError):
            continue
        if candidate == path:
            if sha256(path) == entry["sha256"]:
                return path
        elif any(output["sha256"] == entry["sha256"] for output in outputs):
            return candidate
    return None


def ancestors(inputs: Iterable[Mapping[str, Any]]) -> dict[Path, dict[str, Any]]:
    """The records of everything that `inputs` were made from; each comes after those of its own inputs."""
    found: dict[Path, dict[str, Any]] = {}

    def visit(inputs: Iterable[Mapping[str, Any]]) -> None:
        for entry in inputs:
            path = record_of(entry)
            if path and path not in found:
                record = read(path)
                visit(record["inputs"])
                found[path] = record

    visit(inputs)
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
