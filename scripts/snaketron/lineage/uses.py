"""From a raw file forward: the jobs that its text went into, and those that it only had an influence on."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from snaketron.files import sha256
from snaketron.lineage.catalogue import Catalogue, Made
from snaketron.lineage.record import Entry
from snaketron.log import UserError
from snaketron.wording import some

# Inputs that decide what becomes of a text, and hold none of it: a tokenizer that was trained on a file, the
# list of its duplicates, the n-grams of an evaluation.
INFLUENCE = {"tokenizer", "template", "exact", "near", "index", "model", "removals"}
HASH = re.compile(r"[0-9a-f]{8,64}")
_OTHERS = "name other directories with --root"


@dataclass(frozen=True)
class Source:
    """A file or another artifact that is asked about."""

    name: str
    identity: str  # its sha256, or a version
    read: list[tuple[Made, Entry]]  # by the jobs that had it as an input


def source(catalogue: Catalogue, what: str) -> Source:
    """What a path, a hash or the beginning of one is about; `UserError` where no record knows it.

    A file is not read where a record has its size and time.
    """
    path = Path(what)
    there = path.is_file()
    if not there and HASH.fullmatch(what):
        return _of_hash(catalogue, what)
    listed = catalogue.inputs_at(path)
    identities = {entry.sha256 for _, entry in listed}
    if there:
        state = path.stat()
        as_listed = (state.st_size, state.st_mtime_ns)
        same = [entry for _, entry in listed if (entry.bytes, entry.modified) == as_listed]
        found = same[0].sha256 if same else sha256(path)
        if catalogue.users(found) or catalogue.maker(found):
            return Source(what, found, catalogue.users(found))
        if not listed:
            raise UserError(
                f"{path}: {_nobody(catalogue)} knows this file (sha256 {found[:12]}): no job there has read "
                f"it; {_OTHERS}"
            )
        known = ", ".join(sorted(identity[:12] for identity in identities))
        raise UserError(
            f"{path}: was changed since it was read (sha256 {found[:12]} now, {known} then); ask by that hash"
        )
    if path.is_dir():
        made = catalogue.about(path)
        return Source(what, made.version or made.digest, catalogue.users_of(made))
    if len(identities) == 1:
        return Source(what, identities.pop(), listed)
    if identities:
        several = ", ".join(sorted(identity[:12] for identity in identities))
        raise UserError(f"{path}: is not here any more, and several files were read there: ask for {several}")
    raise UserError(
        f"{what}: no such file, and {_nobody(catalogue)} knows a file there, or a hash that begins so; "
        f"{_OTHERS}"
    )


def _nobody(catalogue: Catalogue) -> str:
    """None of the records that were asked, with where they lie."""
    return f"no record below {some(catalogue.roots, 4)}"


def _of_hash(catalogue: Catalogue, beginning: str) -> Source:
    found = catalogue.identities(beginning)
    if not found:
        raise UserError(f"{beginning}: {_nobody(catalogue)} knows a file whose sha256 begins so; {_OTHERS}")
    if len(found) > 1:
        raise UserError(f"{beginning}: {len(found)} files have a sha256 that begins so; give more of it")
    read = catalogue.users(found[0])
    return Source(read[0][1].path if read else found[0], found[0], read)


@dataclass
class Reach:
    """The jobs that a source reaches, in an order in which they may have run."""

    holders: list[Made]  # its text went into what they made, or into the weights
    influenced: list[Made]  # only through a tokenizer, or a list of what to remove


def reach(catalogue: Catalogue, sources: Iterable[Source]) -> Reach:
    """All jobs after the sources."""
    sources = list(sources)
    first = [(user, entry) for one in sources for user, entry in _users(catalogue, one)]
    holders: dict[str, Made] = {}
    touched: dict[str, Made] = {}
    waiting = [(user, entry.name not in INFLUENCE) for user, entry in first]
    while waiting:
        made, holds = waiting.pop()
        if made.digest in holders or (not holds and made.digest in touched):
            continue
        (holders if holds else touched)[made.digest] = made
        waiting += [(user, holds and entry.name not in INFLUENCE) for user, entry in catalogue.users_of(made)]
    only = [made for digest, made in touched.items() if digest not in holders]
    return Reach(_ordered(catalogue, holders.values()), _ordered(catalogue, only))


def unknown(catalogue: Catalogue) -> list[Made]:
    """The checkpoints whose blend no record is about any more, and all that was made of them.

    A blend that is made again takes the place of the one before, with its record. What was trained on that
    may hold any text.
    """

    def is_lost(made: Made) -> bool:
        blends = made.record.inputs_named("blend") if made.record.is_training else ()
        return any(catalogue.made_by(entry, made) is None for entry in blends)

    lost = list(filter(is_lost, list(catalogue.all)))
    built = reach(catalogue, (Source(m.version, m.version, catalogue.users_of(m)) for m in lost)).holders
    return _ordered(catalogue, [*lost, *built])


def _users(catalogue: Catalogue, one: Source) -> list[tuple[Made, Entry]]:
    """Who used a source; where it is an output of a job, also those that name the job's record."""
    maker = catalogue.maker(one.identity)
    return [*one.read, *(catalogue.users_of(maker) if maker and not one.read else ())]


def _ordered(catalogue: Catalogue, found: Iterable[Made]) -> list[Made]:
    """Jobs by the number of steps between them and the raw files, and by name."""
    wanted = {made.digest: made for made in found}
    depths: dict[str, int] = {}

    def depth(made: Made) -> int:
        if made.digest not in depths:
            depths[made.digest] = 0  # against a circle of records that were tampered with
            makers = (catalogue.made_by(entry, made) for entry in made.record.inputs)
            depths[made.digest] = 1 + max((depth(m) for m in makers if m and m.digest in wanted), default=0)
        return depths[made.digest]

    return sorted(wanted.values(), key=lambda made: (depth(made), made.record.kind, made.record.name))


def by_kind(found: Iterable[Made]) -> dict[str, list[str]]:
    """The names of jobs by kind; a checkpoint by its version."""
    kinds: dict[str, list[Made]] = defaultdict(list)
    for made in found:
        kinds[made.record.kind].append(made)
    return {kind: called(same, lambda made: made.version or made.record.name) for kind, same in kinds.items()}


def called(found: Sequence[Made], name: Callable[[Made], str]) -> list[str]:
    """The names of jobs; those of the same name, in two directories, with the paths of their records."""
    counts = Counter(map(name, found))
    here = f"{Path.cwd()}{os.sep}"
    return [
        f"{name(made)} ({str(made.path).removeprefix(here)})" if counts[name(made)] > 1 else name(made)
        for made in found
    ]
