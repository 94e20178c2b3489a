"""Lineage records: what an artifact was made from, with which settings and versions, and what came out.

Every rule writes one record beside its outputs, after them, so a record says that they are complete.
Later rules read counts and hashes from it, and W&B artifacts are logged from it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from snaketron.files import sha256, to_json, writing
from snaketron.lineage.provenance import cpu_seconds, provenance
from snaketron.log import UserError

import orjson

REFERENCE = ("path", "sha256", "bytes", "modified", "version", "revision")
BEGINNING = b'{\n  "kind": "'  # of each record, and of hardly another file
# The key of a Parquet footer under which a file says what it is and what made it.
FOOTER = b"snaketron"
PACKAGES = (
    *("snaketron", "datatrove", "tokenizers", "fastokens", "pyarrow", "torch", "megatron-core"),
    *("numpy", "transformers", "transformer-engine", "mamba-ssm", "causal-conv1d"),
)
# What a record may be about; each rule has its own.
Kind = Literal[
    "raw",
    "sample",
    "tokenizer",
    "chat_template",
    "filtered",
    "exact_signature",
    "exact_duplicates",
    "minhash_signature",
    "minhash_pairs",
    "near_duplicates",
    "decontamination_index",
    "curated",
    "tokens",
    "registered_tokens",
    "blend",
    "index",
    "render_chat",
    "pack_sft",
    "registered_packs",
    "blend_sft",
    "checkpoint",
    "export",
    "evaluation",
    "report",
]
_MAY_LACK = ("key", "provenance")


@dataclass(frozen=True, slots=True)
class Entry:
    """An input or an output of a job: what it is to the job (`name`), where it lies, and what identifies it.

    A file has a `sha256`, a checkpoint its `version`, a tokenizer of the hub its `revision`.
    """

    name: str
    path: str
    sha256: str = ""
    bytes: int = 0  # of outputs and of files of the user
    modified: int = 0  # time of a file of the user when it was read, in nanoseconds since 1970
    version: str = ""
    revision: str = ""

    @property
    def file(self) -> Path:
        return Path(self.path)

    @property
    def identity(self) -> str:
        """What tells it from another one, wherever it lies."""
        return self.sha256 or self.version or self.revision

    @property
    def reference(self) -> dict[str, Any]:
        """The entry without its name, as config.yaml and W&B list what a training was made from."""
        values = {key: getattr(self, key) for key in REFERENCE}
        return {key: value for key, value in values.items() if value}

    def renamed(self, name: str) -> Entry:
        return Entry(name, **self.reference)


@dataclass(frozen=True, slots=True)
class Record:
    """What one job made. Several inputs may have the same name; each output has its own."""

    kind: Kind
    name: str
    created: str  # ISO 8601, UTC
    seconds: float  # time that the job took
    inputs: tuple[Entry, ...]
    outputs: tuple[Entry, ...]
    settings: dict[str, Any]
    versions: dict[str, str | None]  # of Python and of the packages that decide on results
    counts: dict[str, Any]  # what went in, came out and was dropped by reason
    key: str | None = None  # of the version, for a checkpoint
    provenance: dict[str, Any] = field(default_factory=dict)  # code, hardware and cost; for readers alone

    @property
    def version(self) -> str:
        """What identifies a checkpoint among all that were trained, as inputs list it; empty for the rest."""
        return f"{self.name}-{self.key}" if self.key else ""

    @property
    def is_training(self) -> bool:
        """Whether it is of a training: adapters are merged, models imported and averaged without a step."""
        names = {entry.name for entry in self.inputs}
        return self.kind == "checkpoint" and "blend" in names and "adapters" not in names

    def output(self, name: str) -> Entry:
        """The output of a name, such as `train.bin`; `KeyError` where there is none."""
        for entry in self.outputs:
            if entry.name == name:
                return entry
        raise KeyError(f"the record of {self.kind} {self.name} has no output {name!r}")

    def inputs_named(self, name: str) -> list[Entry]:
        return [entry for entry in self.inputs if entry.name == name]

    def as_json(self) -> dict[str, Any]:
        value = {part.name: getattr(self, part.name) for part in fields(self)}
        value["inputs"] = [{"name": entry.name, **entry.reference} for entry in self.inputs]
        value["outputs"] = [
            {"name": e.name, "path": e.path, "sha256": e.sha256, "bytes": e.bytes} for e in self.outputs
        ]
        return {name: part for name, part in value.items() if name not in _MAY_LACK or part}


def directory_name(version: str) -> str:
    """What the directory of a version is called: its `Record.version`, whose stage may hold a slash."""
    return version.replace("/", "_")


# -------------------------------------------------------------------------------------------- reading


def read(path: Path) -> Record:
    """Read a record; `UserError` when there is none or it is not one."""
    try:
        return parse(path, path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such record; the rule that makes it has not finished") from None


def parse(path: Path, text: bytes) -> Record:
    """The record that is the text of the file `path`; `UserError` when it is not one."""
    try:
        value = orjson.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: not a lineage record ({error}); {_again(path)}") from None
    try:
        entries = {side: tuple(Entry(**entry) for entry in value[side]) for side in ("inputs", "outputs")}
        return Record(**{**value, **entries})
    except (KeyError, TypeError):
        raise UserError(f"{path}: not a lineage record; {_again(path)}") from None


def _again(path: Path) -> str:
    """What makes a damaged record again: of a published checkpoint only its link is an output of a rule."""
    link = f" and the link {path.parent}" if path.parent.is_symlink() else ""
    return f"delete it{link} and run again"


def begins(text: bytes) -> bool:
    """Whether a file with this beginning is a record, or may be one that was cut short or lost its bytes."""
    return BEGINNING.startswith(text[: len(BEGINNING)].rstrip(b"\0"))


# -------------------------------------------------------------------------------------------- writing

type Given = Path | Entry | Iterable[Path | Entry]


@dataclass
class Job:
    """A job that is writing: where its outputs lie for now, and what its record will say."""

    aside: dict[str, Path]  # where to write each output, by name
    inputs: Mapping[str, Given] = field(default_factory=dict)  # by name; files are hashed for the record
    settings: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, Any] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)  # sha256 of outputs that need not be read for it
    present: list[Entry] = field(default_factory=list)  # outputs that the job has put in place by itself
    key: str | None = None
    hardware: dict[str, Any] = field(default_factory=dict)  # beside what this process sees of it
    cost: dict[str, float] = field(default_factory=dict)  # where more than this process took part
    _record: Record | None = None

    @property
    def record(self) -> Record:
        """The record that was written; there is none before the block ends."""
        assert self._record is not None, "the block of making() has not ended"
        return self._record


@contextlib.contextmanager
def making(
    kind: Kind, name: str, *, outputs: Mapping[str, Path], record: Path, started: float | None = None
) -> Iterator[Job]:
    """Write `outputs` and then their `record`: all of them appear when the block succeeds, else nothing.

    The block writes to `job.aside[name]`, and says in `job` what the record needs. The job's time counts from
    `started` (`time.monotonic()`), or from the beginning of the block.
    """
    begun = time.monotonic() if started is None else started
    cpu_before = cpu_seconds()
    with writing(*outputs.values(), record) as temporary:
        job = Job(dict(zip(outputs, temporary, strict=False)))
        yield job
        written = [
            Entry(key, str(outputs[key]), job.hashes.get(key) or sha256(path), path.stat().st_size)
            for key, path in job.aside.items()
        ]
        job._record = Record(
            kind=kind,
            name=name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            inputs=tuple(_named(job.inputs)),
            outputs=(*written, *job.present),
            settings=dict(job.settings),
            versions={"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
            counts=dict(job.counts),
            key=job.key,
            seconds=round(time.monotonic() - begun, 2),
            provenance=provenance(
                job.hardware, job.cost or {"cpu_seconds": round(cpu_seconds() - cpu_before, 2)}
            ),
        )
        temporary[-1].write_bytes(to_json(job.record.as_json()))


def of_file(name: str, path: Path) -> Entry:
    """A file that lies at its place, read for its hash."""
    return Entry(name, str(path), sha256(path), path.stat().st_size)


def of_user(path: Path) -> Entry:
    """A file of the user, read for its hash, with what tells cheaply whether it was changed since.

    The time is taken before the file is read: one that is written meanwhile is another file later.
    """
    state = path.stat()
    return Entry("", str(path), sha256(path), state.st_size, state.st_mtime_ns)


class Opened:
    """The files of the user that a job reads, in their order; each is noted before it is read.

    The hash in a record is of the file at the end of the job, and says that its data is from that file.
    """

    def __init__(self) -> None:
        self._states: dict[Path, os.stat_result | None] = {}

    def note(self, path: Path) -> None:
        """Remember the state of a file; what is wrong with one that is not there, its reader says."""
        try:
            self._states[path] = path.stat()
        except OSError:
            self._states[path] = None

    def __iter__(self) -> Iterator[Path]:
        return iter(self._states)

    def entries(self) -> Iterator[Entry]:
        """The files for the record; `UserError` when one was written or replaced since it was noted."""
        for path, state in self._states.items():
            entry = of_user(path)
            if state and (state.st_size, state.st_mtime_ns) != (entry.bytes, entry.modified):
                raise UserError(f"{path}: was changed while it was read; run again when it stays as it is")
            yield entry


def _named(inputs: Mapping[str, Given]) -> Iterator[Entry]:
    for name, given in inputs.items():
        for one in [given] if isinstance(given, Path | Entry) else given:
            yield one.renamed(name) if isinstance(one, Entry) else Entry(name, str(one), sha256(one))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
