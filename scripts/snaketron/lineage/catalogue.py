"""All records below some directories, by what they are about: what made an artifact, and who used it.

Artifacts are found by their hashes and not by their paths, so a directory may have been copied or moved, and
a file that was made again is not taken for the one that was used. Snakemake is not asked. Ten thousand
records are read in a second.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from snaketron.files import sha256
from snaketron.lineage.placed import Placed, plain
from snaketron.lineage.record import BEGINNING, Entry, begins, parse
from snaketron.lineage.walk import damage, places, record_of
from snaketron.log import UserError, logger
from snaketron.wording import some

READERS, AT_ONCE = 16, 64  # threads, for file systems that take milliseconds to open a file; files of a task
PASSED_OVER = ("wandb", "node_modules")
# What a working directory has; raw files of the user may lie in some `data`, too.
_OF_A_RUN = (
    "Snakefile",
    "ckpt",
    *(f"data/{name}" for name in ("tokenizer", "tokens", "chat", "sample", "hub")),
)


@dataclass(frozen=True, eq=False)
class Made(Placed):
    """A job that a record tells of."""

    digest: str  # sha256 of the record file, by which a blend names it

    @property
    def title(self) -> str:
        """The kind and the name, which often begins with the kind."""
        kind, name = self.record.kind, self.record.name
        return name if name.startswith(kind) else f"{kind} {name}".strip()

    @property
    def version(self) -> str:
        return self.record.version


class Catalogue:
    """The records that were found; `made_by` finds those that lie elsewhere by the paths of inputs."""

    def __init__(self, found: Iterable[Made], roots: Iterable[Path]) -> None:
        self.roots = [plain(root) for root in roots]
        self.all: list[Made] = []
        self._elsewhere: set[str] = set()  # the digests of records that are not below the roots
        self._by_digest: dict[str, Made] = {}
        self._by_output: dict[str, list[Made]] = defaultdict(list)
        self._by_version: dict[str, Made] = {}
        self._by_path: dict[str, list[Made]] = defaultdict(list)
        self._by_name: dict[str, list[Made]] = defaultdict(list)  # of the record's file
        for made in sorted(found, key=lambda made: (str(made.path).count(os.sep), str(made.path))):
            self.add(made)

    def add(self, made: Made) -> None:
        """Take up a record, unless it is a copy of one that is there."""
        if made.digest in self._by_digest:
            return
        self._by_digest[made.digest] = made
        self.all.append(made)
        self._by_name[made.path.name].append(made)
        for output in made.record.outputs:
            self._by_path[output.path].append(made)
            if output.sha256:
                self._by_output[output.sha256].append(made)
        if made.version:
            self._by_version.setdefault(made.version, made)

    def made_by(self, entry: Entry, user: Made) -> Made | None:
        """The job that made an input of `user`; None for a raw file, and where no record is to be found.

        A record that is not below the roots is looked for by the path of the input. Checkpoints are few, so
        theirs are looked for in any case.
        """
        if entry.version:
            return self._by_version.get(entry.version) or self._beside(entry, user)
        found = self._by_digest.get(entry.sha256)
        if user.digest in self._elsewhere:  # its paths are those of another directory
            found = found or self._beside(entry, user)
        found = found or self._writer(entry, user)
        if found is None and not self._is_below(entry.file):
            found = self._beside(entry, user)
        return found or self._writer_of_copy(entry, user)

    def _writer(self, entry: Entry, user: Made) -> Made | None:
        """The job that wrote an input to its path; of several directories, in the one that it lies in."""
        same = (made for made in self._by_output.get(entry.sha256, ()) if made is not user)
        found = [(made, out) for made in same for out in made.record.outputs if out.path == entry.path]
        if len(found) > 1:
            place = user.place(entry).resolve()
            found.sort(key=lambda one: one[0].output_place(one[1]).resolve() != place)
        return found[0][0] if found else None

    def _beside(self, entry: Entry, user: Made) -> Made | None:
        """The job whose record lies where the path of an input leads."""
        with contextlib.suppress(UserError, OSError):
            if beside := record_of(user.placed(entry)):
                path, record = beside
                found = Made(path.absolute(), record, hashlib.sha256(path.read_bytes()).hexdigest())
                if found.digest not in self._by_digest:
                    self.add(found)
                    self._elsewhere.add(found.digest)
                return None if found.digest == user.digest else self._by_digest[found.digest]
        return None

    def _writer_of_copy(self, entry: Entry, user: Made) -> Made | None:
        """The job that made the same as an input elsewhere, before it was used.

        Small files are the same in many exports, such as a config.json. What a job copies has the hash of its
        own output, and so have other copies.
        """
        same = self._by_output.get(entry.sha256, ())
        if any(made is user for made in same):
            return None
        return next((made for made in same if made.record.created <= user.record.created), None)

    def _is_below(self, path: Path) -> bool:
        """Whether a path lies below the roots, where all records are known."""
        whole = plain(path)
        return any(whole.is_relative_to(root) for root in self.roots)

    def maker(self, sha256: str) -> Made | None:
        """The job that made a file of a hash; the first one of several."""
        return next(iter(self._by_output.get(sha256, ())), None)

    def remade(self, entry: Entry) -> Made | None:
        """The record of a job that has since made another file at the path of an input, which is a file."""
        found = self._by_path.get(entry.path, [])
        if not found:
            same_name = self._by_name.get(entry.file.name, ())
            found = [made for made in same_name if str(made.path).endswith(f"/{entry.path}")]
        return found[-1] if found else None

    @cached_property
    def _users(self) -> dict[str, list[tuple[Made, Entry]]]:
        """By hash or version of an input, the jobs that used it. No record is added after it is asked."""
        users = defaultdict(list)
        for made in self.all:
            for entry in made.record.inputs:
                users[entry.version or entry.sha256].append((made, entry))
        return users

    def users(self, identity: str) -> list[tuple[Made, Entry]]:
        """The jobs that had an input of this hash or version, each with that input."""
        return self._users.get(identity, []) if identity else []

    def users_of(self, made: Made) -> list[tuple[Made, Entry]]:
        """The jobs that used something of a job, each with that input."""
        outputs = {output.sha256 for output in made.record.outputs}
        return [
            (user, entry)
            for identity in (made.digest, made.version, *outputs)
            for user, entry in self.users(identity)
            if self.made_by(entry, user) is made
        ]

    def identities(self, beginning: str) -> list[str]:
        """All hashes of inputs, outputs and records, and versions, that begin like this."""
        known = {*self._users, *self._by_output, *self._by_digest, *self._by_version}
        return sorted(identity for identity in known if identity.startswith(beginning))

    def inputs_at(self, path: Path) -> list[tuple[Made, Entry]]:
        """The inputs of all jobs that lie, or lay, at a path."""
        wanted = str(path.resolve())
        name = path.name
        return [
            (made, entry)
            for made in self.all
            for entry in made.record.inputs
            if entry.path.endswith(name) and str(made.place(entry).resolve()) == wanted
        ]

    def about(self, path: Path) -> Made:
        """The job that made a file or directory, or whose record it is; `UserError` where none is known."""
        wanted = path.resolve()
        candidates: list[Made] = []
        for place in {wanted, wanted / "record.json", *places(wanted)}:
            candidates += (m for m in self._by_name.get(place.name, ()) if m.path.resolve() == place)
        for made in candidates:
            if made.path.resolve() in (wanted, wanted / "record.json"):
                return made
        for parts in (path.absolute().parts, wanted.parts):
            for i in range(len(parts)):
                candidates += self._by_path.get(str(Path(*parts[i:])), [])
        for made in candidates:
            if any(made.output_place(output).resolve() == wanted for output in made.record.outputs):
                return made
        if path.is_file() and (same := self._by_output.get(sha256(path))):  # a copy, as eval/sft.json is one
            return max(same, key=lambda made: made.record.created)
        if not path.exists():
            raise UserError(f"{path}: no such file or directory, and no record lists it as an output")
        if wrong := damage(path):
            raise UserError(f"{path}: {wrong}")
        used = f"; it is an input: --who-uses {path} says whose" if self.inputs_at(path) else ""
        raise UserError(f"{path}: no record says what it was made from{used}")

    def ancestors(self, made: Made) -> Iterator[Made]:
        """Everything that a job's outputs were made from, the job last; each after what it was made from."""
        seen: set[str] = set()
        stack = [(made, iter(made.record.inputs))]
        seen.add(made.digest)
        while stack:
            current, inputs = stack[-1]
            for entry in inputs:
                maker = self.made_by(entry, current)
                if maker and maker.digest not in seen:
                    seen.add(maker.digest)
                    stack.append((maker, iter(maker.record.inputs)))
                    break
            else:
                yield current
                stack.pop()


# --------------------------------------------------------------------------------------------- finding


def scan(*roots: Path) -> Catalogue:
    """The catalogue of all records below some directories, with a warning of those that are damaged.

    Hidden directories are passed over.
    """
    paths = sorted(_json_files(roots))
    chunks = [paths[i : i + AT_ONCE] for i in range(0, len(paths), AT_ONCE)]
    with ThreadPoolExecutor(READERS) as pool:
        found = [one for chunk in pool.map(_read_all, chunks) for one in chunk]
    if damaged := [str(one) for one in found if isinstance(one, Path)]:
        logger.warning("damaged records, and what they tell is missing here: %s", some(damaged))
    return Catalogue((one for one in found if isinstance(one, Made)), roots)


def root_of(path: Path) -> Path:
    """The working directory that an artifact belongs to: the nearest one that looks like one, or this one."""
    if found := _run_around(path):
        return found
    if path.absolute().is_relative_to(Path.cwd()):
        return Path.cwd()
    raise UserError(
        f"{path}: lies in no working directory of the workflow; name the directories that hold records "
        "with --root"
    )


def roots_of(file: Path) -> list[Path]:
    """The working directories whose jobs may have read a file: this one, and the one that it lies in."""
    here = _run_around(Path.cwd() / file.name)
    if here is None:
        return [root_of(file)]
    there = _run_around(file)
    return [here] if there in (None, here) else [here, there]


def _run_around(path: Path) -> Path | None:
    """The nearest directory above a path that looks like a working directory."""
    likely = (p for p in path.absolute().parents if any((p / name).exists() for name in _OF_A_RUN))
    return next(likely, None)


def _json_files(roots: Collection[Path]) -> Iterator[str]:
    """All files `*.json`; a directory that links lead to as well counts once, under its own name."""
    directories = [str(root.absolute()) for root in roots]
    links: list[str] = []
    for root in roots:
        if not root.is_dir():
            raise UserError(f"{root}: no such directory")
    seen: set[tuple[int, int]] = set()
    while directories or links:
        directory = directories.pop() if directories else links.pop()
        try:
            state = Path(directory).stat()
            if (state.st_dev, state.st_ino) in seen:
                continue
            seen.add((state.st_dev, state.st_ino))
            entries = list(os.scandir(directory))
        except OSError:  # a link to nothing or to a file, or a directory of somebody else
            continue
        for entry in entries:
            if entry.name.startswith(".") or entry.name in PASSED_OVER:
                continue
            if entry.name.endswith(".json"):
                yield entry.path
            elif entry.is_dir(follow_symlinks=False):
                directories.append(entry.path)
            elif entry.is_symlink():
                links.append(entry.path)


def read_all(paths: Iterable[str | Path]) -> list[Made]:
    """The jobs that some files tell of; a file that is no record, or a damaged one, is passed over."""
    return [one for one in _read_all(paths) if isinstance(one, Made)]


def _read_all(paths: Iterable[str | Path]) -> list[Made | Path]:
    """The records among some files; of a damaged one its path."""
    found: list[Made | Path] = []
    for path in map(Path, paths):
        try:
            with path.open("rb", buffering=0) as file:
                beginning = file.read(len(BEGINNING))
                if begins(beginning):
                    text = beginning + file.readall()
                    found.append(Made(path, parse(path, text), hashlib.sha256(text).hexdigest()))
        except UserError:
            found.append(path)
        except OSError:
            continue
    return found
