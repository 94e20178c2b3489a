"""The tree from an artifact back to the raw files, as text and as a Mermaid diagram.

Jobs of one kind and corpus that serve the same purpose are one branch: ten thousand shards are a line.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from snaketron.lineage.catalogue import Catalogue, Made
from snaketron.lineage.provenance import commit, machine
from snaketron.lineage.record import Entry
from snaketron.lineage.walk import damage, why_lost
from snaketron.wording import plural, short_duration

if TYPE_CHECKING:
    from rich.tree import Tree

SHOWN = 3  # raw files of a branch that are named

_Group = tuple[str, str, str]  # the role, kind and corpus of jobs


@dataclass
class Branch:
    """Jobs of one kind, or inputs that no record says the origin of; and what they were made from."""

    role: str  # what they are to the branch below which this one hangs; empty for the first
    makers: list[Made] = field(default_factory=list)
    raw: list[tuple[Made, Entry]] = field(default_factory=list)  # the inputs, each with a job that read it
    used: list[str] = field(default_factory=list)  # the paths of what was used of the jobs' outputs
    branches: list[Branch] = field(default_factory=list)
    is_above: bool = False  # the same jobs hang elsewhere, with what they were made from

    @property
    def title(self) -> str:
        if not self.makers:
            what = "checkpoint" if self.is_checkpoint else "raw file"
            name = f"{what} {self.raw[0][1].version}".strip()
            return plural(len(self.raw), what) if len(self.raw) > 1 else name
        first = self.makers[0]
        if len(self.makers) == 1:
            return first.title
        return f"{first.record.kind} {corpus(first)}, {plural(len(self.makers), 'shard')}"

    @property
    def is_checkpoint(self) -> bool:
        """Whether these are checkpoints, which are never raw files, although their records may be gone."""
        return bool(self.makers[0].version if self.makers else self.raw[0][1].version)

    @property
    def place(self) -> str:
        """The first of the paths, and how many more there are."""
        used = self.used if len(self.makers) == 1 else []
        more = max(len(self.makers), len(self.raw), len(used)) - SHOWN
        return ", ".join(self.places) + (f" and {more:,} more" if more > 0 else "")

    @property
    def places(self) -> list[str]:
        """The first of the paths, as the records have them."""
        if self.makers:
            if self.is_checkpoint:
                return [os.path.relpath(made.path.parent) for made in self.makers[:SHOWN]]
            if len(self.makers) == 1 and self.used:
                return self.used[:SHOWN]
            return [entry.path for made in self.makers[:SHOWN] for entry in made.record.outputs[:1]]
        return [entry.path for _, entry in self.raw[:SHOWN]]


def corpus(made: Made) -> str:
    """The corpus, source or stage of a record."""
    return made.record.name if made.version else made.record.name.partition("/")[0]


def is_file(entry: Entry) -> bool:
    """Whether an input is a file here, and not an address or a model of the hub."""
    return not entry.revision and "://" not in entry.path


def grow(catalogue: Catalogue, *jobs: Made) -> list[Branch]:
    """The branch of each job, with all that its outputs were made from."""
    seen: set[frozenset[str]] = set()

    def branch(role: str, makers: list[Made], used: Iterable[str] = ()) -> Branch:
        identity = frozenset(made.digest for made in makers)
        if identity in seen and any(made.record.inputs for made in makers):
            return Branch(role, makers, used=list(used), is_above=True)
        seen.add(identity)
        groups, raw, paths = _inputs(catalogue, makers)
        hanging = [branch(key[0], list(found.values()), paths[key]) for key, found in groups.items()]
        hanging += [Branch(role, raw=list(found.values())) for role, found in raw.items()]
        return Branch(role, makers, used=list(used), branches=hanging)

    return [branch("", [made]) for made in jobs]


def _inputs(
    catalogue: Catalogue, makers: Iterable[Made]
) -> tuple[
    dict[_Group, dict[str, Made]], dict[str, dict[str, tuple[Made, Entry]]], dict[_Group, dict[str, None]]
]:
    """What some jobs used: jobs by role, kind and corpus; what has no record by role; paths of outputs."""
    groups: dict[_Group, dict[str, Made]] = defaultdict(dict)
    raw: dict[str, dict[str, tuple[Made, Entry]]] = defaultdict(dict)
    paths: dict[_Group, dict[str, None]] = defaultdict(dict)
    for made in makers:
        for entry in made.record.inputs:
            maker = catalogue.made_by(entry, made)
            if maker:
                key = (entry.name, maker.record.kind, corpus(maker))
                groups[key][maker.digest] = maker
                if any(output.path == entry.path for output in maker.record.outputs):
                    paths[key][entry.path] = None
            else:
                raw[entry.name][entry.path + entry.sha256 + entry.version] = (made, entry)
    return groups, raw, paths


def trouble(catalogue: Catalogue, user: Made, entry: Entry) -> str:
    """What is wrong with an input that no record says the origin of; empty for a raw file that is there."""
    if entry.version:
        return why_lost(user.placed(entry))
    if is_file(entry) and (wrong := damage(user.place(entry))):
        return wrong
    remade = catalogue.remade(entry)
    if remade:
        return f"made again since, on {remade.record.created}: its origin is not recorded"
    if is_file(entry) and not user.place(entry).exists():
        return "not here any more"
    return ""


def troubles(catalogue: Catalogue, branch: Branch) -> list[str]:
    """What is wrong with the inputs of a branch, a line each."""
    found = Counter(trouble(catalogue, user, entry) for user, entry in branch.raw)
    several = len(branch.raw) > 1
    return [f"{n:,} of them: {said}" if several else said for said, n in found.items() if said]


# ------------------------------------------------------------------------------------------------ text


def show(catalogue: Catalogue, made: Made) -> Tree:
    """The tree for a terminal."""
    from rich.markup import escape
    from rich.tree import Tree

    def label(branch: Branch) -> str:
        role = f"[dim]{escape(branch.role)}:[/] " if branch.role else ""
        above = " [dim](see above)[/]" if branch.is_above else ""
        return f"{role}[bold]{escape(branch.title)}[/]{above}  [cyan]{escape(branch.place)}[/]"

    def hang(branch: Branch, on: Tree) -> None:
        for problem in troubles(catalogue, branch):
            on.add(f"[red]{escape(problem)}[/]")
        for child in branch.branches:
            hang(child, on.add(label(child)))

    (root,) = grow(catalogue, made)
    tree = Tree(label(root), highlight=False)
    for fact in facts(made):
        tree.add(f"[dim]{escape(fact)}[/]")
    hang(root, tree)
    return tree


def facts(made: Made) -> list[str]:
    """Lines that tell when an artifact was made, in how long, by what code and on what machine."""
    record, about = made.record, made.record.provenance
    lines = [f"made on {record.created}, in {short_duration(record.seconds)}"]
    if code := about.get("code"):
        lines.append(f"code {commit(code)}")
    if hardware := about.get("hardware"):
        lines.append(machine(hardware))
    if cost := about.get("cost"):
        lines.append(", ".join(f"{n:,.1f} {name.replace('_', ' ')}" for name, n in cost.items()))
    versions = (f"{name} {version}" for name, version in record.versions.items() if version)
    lines.append(", ".join(versions))
    return [line for line in lines if line]


# --------------------------------------------------------------------------------------------- Mermaid


def mermaid(catalogue: Catalogue, made: Made) -> str:
    """The tree as a Mermaid flowchart, in which each branch is drawn once."""
    numbers: dict[Any, str] = {}
    lines: list[str] = []

    def draw(branch: Branch) -> str:
        raw = frozenset((entry.path, entry.version) for _, entry in branch.raw)
        key = frozenset(m.digest for m in branch.makers) or raw
        if key not in numbers:
            numbers[key] = f"n{len(numbers)}"
            first = branch.places[0] if branch.places else ""
            shape = ('["', '"]') if branch.makers or branch.is_checkpoint else ('[("', '")]')
            lines.append(f"  {numbers[key]}{shape[0]}{_quoted(branch.title)}<br>{_quoted(first)}{shape[1]}")
        if not branch.is_above:
            for child in branch.branches:
                arrow = f"  {draw(child)} -->|{_quoted(child.role)}| {numbers[key]}"
                if arrow not in lines:
                    lines.append(arrow)
        return numbers[key]

    draw(*grow(catalogue, made))
    return "\n".join(["flowchart LR", *lines])


def _quoted(text: str) -> str:
    """Text for a label: Mermaid reads entities, and a quotation mark ends a label."""
    return "".join(c if c.isalnum() or c in " ._-/,:" else f"#{ord(c)};" for c in text)
