"""Whether the files of the user are still those that a finished job was made from, by the record of the job.

Snakemake compares times. So it would not see a file that an older one has replaced (`cp -p`, `rsync -a`, a
backup that was restored), and would run a job again for a large file that was only touched. The record knows
better: it has the size and time of each file, and where one of them is another now, its hash decides.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from snaketron.files import sha256
from snaketron.lineage.record import Entry, read
from snaketron.log import UserError, logger
from snaketron.sources.local import SAMPLE
from snaketron.wording import size_text

import orjson

_LARGE = 1_000_000_000  # bytes that take seconds to hash


class _Made(NamedTuple):
    """What a finished job read, and the state of its record; None where the record is gone."""

    inputs: tuple[Entry, ...]
    state: os.stat_result | None


class RawFiles:
    """Tells Snakemake which files a job has to be run again for.

    Args:
        workflow: Snakemake's, in its main process; a job that it starts runs in any case.
        root: the root of the data, or of checkpoints, with the records.
        hashes: where the hashes of files are kept, so that each state of a file is read once.
    """

    def __init__(self, workflow: Any, root: Path, hashes: Path = Path(".snakemake/snaketron.hashes")) -> None:
        self._workflow, self._root = workflow, root
        self._hashes = _Kept(hashes)  # of files, by path, size and time
        # What each record says of its inputs. A record may be gone, and what was made of its outputs there:
        # the user has deleted them for their space, or the job was to run again for other files and failed.
        # Nothing else then says of which files that was made.
        self._inputs = _Kept(hashes.with_name("snaketron.inputs"))
        self._records: dict[str, _Made | None] = {}
        self._names: dict[str, set[str]] = {}  # of each directory of records what it holds
        self._forced: set[str] = set()  # rules that run again for a changed directory

    def seen_by(self, record: str, files: Iterable[str]) -> list[str]:
        """The input files of the job that writes `record` (below the root), marked for Snakemake.

        What is as it was is `ancient`. What is not gets a late time, in Snakemake's own list of times.
        Files that rules make stay as they are, because Snakemake knows the jobs that make them.
        """
        from snakemake.io import ancient
        from snakemake_interface_storage_plugins.io import Mtime

        made = self._read(record)
        inputs = {entry.path: entry for entry in made.inputs} if made else {}
        marked = []
        for file in files:
            entry = inputs.get(str(Path(file))) if not SAMPLE.fullmatch(file) else None
            if made and entry and self.unchanged(entry):
                file = ancient(file)
            elif made and entry:
                # Later than all that the job wrote, also on a machine whose clock was ahead.
                late = max(time.time(), made.state.st_mtime + 1 if made.state else 0)
                self._workflow.iocache.mtime[file] = Mtime(local=late, local_target=late)
                if not made.state:  # Snakemake may know the hash of the file from a job that failed
                    self._workflow.dag.forcefiles.add(str(self._root / record))
            marked.append(file)
        return marked

    def watch_directory(self, rule: str, record: str, directory: Path) -> None:
        """Have a rule run again if a file in a directory of the user is not as the record of the rule says.

        Snakemake is not told the files: new inputs of a rule would have it make again what is finished.
        """
        made = self._read(record)
        entries = [entry for entry in made.inputs if entry.file.parent == directory] if made else []
        changed = [entry.file for entry in entries if entry.file.exists() and not self.unchanged(entry)]
        if changed and rule not in self._forced:
            logger.info("%s: changed since rule %s read it, so the rule runs again", changed[0], rule)
            self._forced.add(rule)
            self._workflow.dag.forcerules.add(self._workflow.get_rule(rule))

    def keep(self) -> None:
        """Keep what the records say now: a run has written some of them."""
        asked, self._records, self._names = list(self._records), {}, {}
        for record in asked:
            self._read(record)

    def unchanged(self, entry: Entry) -> bool:
        """Whether a file is as an entry of a record says."""
        try:
            now = entry.file.stat()
        except OSError:
            return False
        if entry.modified and now.st_size != entry.bytes:
            return False
        return now.st_mtime_ns == entry.modified or self._hash(entry.file, now) == entry.sha256

    def _hash(self, path: Path, state: os.stat_result) -> str:
        key = str(path), state.st_size, state.st_mtime_ns
        found: str | None = self._hashes.get(*key)
        if found is None:
            if state.st_size >= _LARGE:
                logger.info("reading %s (%s), to see if it was changed", path, size_text(state.st_size))
            found = sha256(path)
            self._hashes.put(found, *key)
        return found

    def _read(self, record: str) -> _Made | None:
        """What a record says, or has said before it was gone."""
        if record not in self._records:
            path, made = self._root / record, None
            if path.name in self._beside(record):
                with contextlib.suppress(UserError, OSError):
                    made = _Made(read(path).inputs, path.stat())
                    self._inputs.put([entry.reference for entry in made.inputs], str(path))
            if made is None and (kept := self._inputs.get(str(path))):
                made = _Made(tuple(Entry("", **values) for values in kept), None)
            self._records[record] = made
        return self._records[record]

    def _beside(self, record: str) -> set[str]:
        """The names in the directory of a record: most records of a new recipe are not there."""
        directory = record.rpartition("/")[0]
        if directory not in self._names:
            self._names[directory] = set()
            with contextlib.suppress(OSError):
                self._names[directory] = {entry.name for entry in os.scandir(self._root / directory)}
        return self._names[directory]


class _Kept:
    """Values by key, in a file of JSON lines: lists of a key and its value. A later value of a key counts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[tuple[Any, ...], Any] | None = None

    def get(self, *key: Any) -> Any:
        """The value of a key; None where it has none."""
        if self._known is None:
            self._known = {}
            with contextlib.suppress(OSError):
                for line in self._path.read_bytes().splitlines():
                    with contextlib.suppress(ValueError, TypeError):  # a line that was cut off
                        *found, value = orjson.loads(line)
                        self._known[tuple(found)] = value
        return self._known.get(key)

    def put(self, value: Any, *key: Any) -> None:
        if self.get(*key) != value and self._known is not None:
            self._known[key] = value
            # Where it cannot be written, the next start finds it again.
            with contextlib.suppress(OSError), self._path.open("ab") as file:
                file.write(orjson.dumps([*key, value]) + b"\n")
