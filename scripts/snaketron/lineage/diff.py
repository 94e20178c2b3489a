"""Why two artifacts differ: settings key by key and files one by one, down to the raw files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from snaketron.lineage.catalogue import Catalogue, Made
from snaketron.lineage.record import Entry
from snaketron.lineage.walk import why_lost
from snaketron.settings.defaults import value_of

RANDOM = (".metadata",)  # of a checkpoint: torch writes a random identifier into it


@dataclass(frozen=True)
class Side:
    """One of the two artifacts, and the records in which its origin is looked up."""

    catalogue: Catalogue
    made: Made

    def maker(self, entry: Entry) -> Side | None:
        made = self.catalogue.made_by(entry, self.made)
        return Side(self.catalogue, made) if made else None


def differences(one: Side, other: Side) -> list[str]:
    """The differences in lines, those of an input indented below it; none where both are the same.

    What two jobs share is told where it comes first.
    """
    return list(_Comparison().jobs(one, other, ""))


class _Comparison:
    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], bool] = {}  # by the records of a pair, whether they differ

    def jobs(self, one: Side, other: Side, indent: str) -> Iterator[str]:
        """The differences of two jobs."""
        a, b = one.made.record, other.made.record
        lines = [f"{indent}kind: {a.kind} {a.name} | {b.kind} {b.name}"] if a.kind != b.kind else []
        lines += [f"{indent}settings.{line}" for line in values(a.settings, b.settings, a.kind)]
        lines += [f"{indent}version of {line}" for line in values(a.versions, b.versions)]
        if (code := values(a.provenance.get("code", {}), b.provenance.get("code", {}))) and self._outputs(
            a, b
        ):
            lines += [f"{indent}code: {line}" for line in code]
        lines += self._inputs(one, other, indent)
        lines += [f"{indent}output {line}" for line in self._outputs(a, b)]
        self._seen[one.made.digest, other.made.digest] = bool(lines)
        yield from lines

    def _outputs(self, a: Any, b: Any) -> list[str]:
        ours, theirs = ({e.name: e for e in record.outputs if e.name not in RANDOM} for record in (a, b))
        return _sets(ours, theirs)

    def _inputs(self, one: Side, other: Side, indent: str) -> Iterator[str]:
        """The differences of the inputs, paired by name and path, or else by their order."""
        groups = (_by_name(one.made), _by_name(other.made))
        for name in [*groups[0], *(name for name in groups[1] if name not in groups[0])]:
            ours, theirs = (dict(group.get(name, {})) for group in groups)
            if len(ours) == len(theirs) == 1:
                theirs = dict(zip(ours, theirs.values(), strict=True))
            for path in [*ours, *(path for path in theirs if path not in ours)]:
                a, b = ours.get(path), theirs.get(path)
                if a is None or b is None:
                    yield f"{indent}{name} {path}: only in {'the first' if a else 'the second'}"
                elif a.identity != b.identity:
                    yield from self._input(name, one, a, other, b, indent)

    def _input(self, name: str, one: Side, a: Entry, other: Side, b: Entry, indent: str) -> Iterator[str]:
        """The difference of an input whose identity is another."""
        ours, theirs = one.maker(a), other.maker(b)
        which = a.path if a.path == b.path else f"{a.path} | {b.path}"
        if ours is None or theirs is None:
            yield f"{indent}{name} {which}: {_short(a)} | {_short(b)}"
            for where, side, entry in (("first", one, a), ("second", other, b)):
                if entry.version and not side.maker(entry):
                    yield f"{indent}  in the {where}: {why_lost(side.made.placed(entry))}"
            return
        pair = ours.made.digest, theirs.made.digest
        if pair in self._seen:
            if self._seen[pair]:
                yield f"{indent}{name} {which}: differs, as told above"
            return
        below = list(self.jobs(ours, theirs, indent + "  "))
        if below:  # else another record of the same content: it was made twice
            yield f"{indent}{name} {which}:"
            yield from below


def values(one: Mapping[str, Any], other: Mapping[str, Any], kind: str = "") -> list[str]:
    """The keys that differ, with both values; keys of a mapping in a mapping are joined by dots.

    Args:
        kind: of the records whose settings these are, which leave out some keys that have their default.

    >>> values({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}, "d": 4})
    ['a.b: 1 | 3', 'd: not set | 4']
    """
    return [f"{key}: {ours} | {theirs}" for key, ours, theirs in changed(one, other, "not set", kind)]


def changed(
    one: Mapping[str, Any], other: Mapping[str, Any], none: Any = None, kind: str = ""
) -> list[tuple[str, Any, Any]]:
    """The keys that differ, as `values` tells them, with both values; `none` where one of them has none."""
    ours, theirs = flat(one), flat(other)
    pairs = {key: tuple(value_of(side, key, kind, none) for side in (ours, theirs)) for key in ours | theirs}
    return [(key, *pair) for key, pair in pairs.items() if pair[0] != pair[1]]


def flat(value: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """The values of nested mappings by their path.

    >>> flat({"sft": {"seed": 1}, "chats": []})
    {'sft.seed': 1, 'chats': []}
    """
    found: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            found |= flat(item, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = item
    return found


def _sets(ours: dict[str, Entry], theirs: dict[str, Entry]) -> list[str]:
    lines = [f"{name}: only in the first" for name in ours if name not in theirs]
    lines += [f"{name}: only in the second" for name in theirs if name not in ours]
    for name, entry in ours.items():
        if name in theirs and entry.sha256 != theirs[name].sha256:
            lines.append(f"{name}: sha256 {entry.sha256[:12]} | {theirs[name].sha256[:12]}")
    return lines


def _by_name(made: Made) -> dict[str, dict[str, Entry]]:
    """The inputs of a job by name and path."""
    groups: dict[str, dict[str, Entry]] = defaultdict(dict)
    for entry in made.record.inputs:
        groups[entry.name][entry.path] = entry
    return groups


def _short(entry: Entry) -> str:
    return entry.version or entry.identity[:24]  # a version is named whole: its key comes last
