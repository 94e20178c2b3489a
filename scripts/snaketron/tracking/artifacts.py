"""The artifacts that a training's run of W&B has: what leads to it, and what it makes.

They are built from lineage records. The names, sizes and hashes of files are logged; the files stay where
they are. Shards, packs and the steps of a curation are not artifacts of their own, because a run of three
trainings would then be lost among dozens of runs: a blend lists the files that it blends, and raw files are
gathered by corpus.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snaketron.files import sha256_of
from snaketron.jobs.version import Version
from snaketron.lineage.record import Entry, Record, read
from snaketron.lineage.walk import record_of, why_lost
from snaketron.log import logger

KINDS = {"blend": "pretraining-blend", "blend_sft": "sft-data", "tokenizer": "tokenizer"}
TRAINED = {
    "pretrain": "pretrained-model",
    "sft": "sft-model",
    "lora": "lora-adapters",
    "lora_merged": "sft-model",
}
OTHER_MODEL = "imported-model"
RAW = "raw-data"
MADE_UP = ("sample", "raw")  # kinds of records whose outputs are raw files: generated, or downloaded
METADATA = ("name", "created", "seconds", "settings", "versions", "counts", "key")


@dataclass
class Artifact:
    """Files with their hashes, under one name."""

    kind: str
    name: str
    files: dict[str, Entry] = field(default_factory=dict)  # by path in the artifact
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def identity(self) -> str:
        """Hash of the files' names and hashes, as 12 hexadecimal digits."""
        return sha256_of({name: entry.sha256 for name, entry in self.files.items()})[:12]

    def add(self, entry: Entry) -> None:
        self.files[entry.path.lstrip("/")] = entry


def model(directory: Path) -> Artifact:
    """The artifact of a finished checkpoint: the files of its last iteration."""
    version = Version(directory)
    record = read(version.record)
    stage = record.name.replace("/", "_")
    made = Artifact(
        TRAINED.get(record.name.partition("/")[0], OTHER_MODEL), f"model-{stage}", {}, _facts(record)
    )
    last = version.iteration_directory(version.latest_iteration() or 0).resolve()
    # Where it lies from here: a record has paths as the training's working directory has them.
    made.files = {e.name: Entry(e.name, str(last / e.name), e.sha256, e.bytes) for e in record.outputs}
    return made


def trainings(inputs: Iterable[Entry]) -> list[Version]:
    """The checkpoints among inputs that were trained, and not imported."""
    made = [record_of(entry) for entry in inputs if entry.version]
    versions = [Version(found[0].parent) for found in made if found]
    return [version for version in versions if version.metrics.exists()]


def leading_to(inputs: Iterable[Entry], consumer: str) -> list[Artifact]:
    """The artifacts of everything that a training's inputs were made from, up to checkpoints.

    `consumer` names the training; files that no rule made are named after what reads them.
    """
    found: dict[str, Artifact] = {}
    seen: set[tuple[str, str]] = set()

    def visit(entry: Entry, reader: str) -> None:
        if (entry.path, reader) in seen:
            return
        seen.add((entry.path, reader))
        made = record_of(entry)
        if made is None and entry.version:
            logger.warning("W&B: %s is no artifact of this run: %s", entry.version, why_lost(entry))
            return
        if made is None or made[1].kind in MADE_UP:
            name = f"raw-{reader}"
            found.setdefault(name, Artifact(RAW, name)).add(entry)
            return
        path, record = made
        if record.kind == "checkpoint":
            artifact = model(path.parent)
            found[artifact.name] = artifact
            return
        if kind := KINDS.get(record.kind):
            _gather(record, kind, found)
        for one in record.inputs:
            visit(one, _reader(record))

    for entry in inputs:
        visit(entry, consumer)
    return list(found.values())


def _gather(record: Record, kind: str, found: dict[str, Artifact]) -> None:
    """Add the artifact of a tokenizer or a blend, with the files of the shards that it blends."""
    name = kind if record.kind in ("blend_sft", "tokenizer") else f"{kind}-{record.name}"
    artifact = found[name] = Artifact(kind, name, {}, _facts(record))
    for entry in record.outputs:
        artifact.add(entry)
    for entry in record.inputs if record.kind != "tokenizer" else ():
        blended = record_of(entry)
        for output in blended[1].outputs if blended and blended[1].kind not in KINDS else ():
            artifact.add(output)


def _reader(record: Record) -> str:
    """What raw files are named after: a corpus, a chat source, the tokenizer."""
    return record.name.partition("/")[0].replace("-", "_") or record.kind


def _facts(record: Record) -> dict[str, Any]:
    values = record.as_json()
    return {name: values[name] for name in METADATA if name in values}
