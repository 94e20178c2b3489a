"""What a checkpoint was made from, down to the raw files, as a tree that opens."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from snaketron.lineage.record import Entry, Record
from snaketron.report.blocks import Part, Text, Tree
from snaketron.report.runs import Run
from snaketron.wording import size_text

FEW = 6  # inputs of one kind that have a line each
MAX_LINES = 500  # lines of a tree


class Origin:
    """Makes the trees of a run. What was shown once is named again, and not opened again."""

    def __init__(self, records: dict[Path, Record]) -> None:
        self.records, self.shown, self.lines = records, set[Path](), 0
        self.of_output = {
            output.sha256: path for path, r in records.items() for output in r.outputs if output.sha256
        }
        self.of_output |= {r.version: path for path, r in records.items() if r.version}

    def tree(self, path: Path) -> Tree:
        """A record that was not shown yet, and what it was made from."""
        self.shown.add(path)
        return Tree(self._line(path), self._branches(self.records[path].inputs))

    def _line(self, path: Path) -> str:
        self.lines += 1
        record = self.records[path]
        key = f" {record.key}" if record.key else ""
        return f"{record.name or path} ({record.kind.replace('_', ' ')}{key})"

    def _branches(self, inputs: tuple[Entry, ...]) -> list[Tree]:
        # What is an input here is opened here, and not deeper in the tree, where it may be one as well.
        made = {entry: self._made(entry) for entry in inputs}
        opened = {path: None for path in made.values() if path and path not in self.shown}
        self.shown.update(opened)
        groups: dict[str, list[Entry]] = defaultdict(list)
        for entry in inputs:
            groups[entry.name].append(entry)
        branches = []
        for name, entries in groups.items():
            trees = [self._branch(e, made[e], opened) for e in entries if self.lines < MAX_LINES]
            if left := len(entries) - len(trees):
                trees.append(Tree(f"{left:,} more"))
            branches += trees if len(entries) <= FEW else [Tree(f"{len(entries):,} x {name}", trees)]
        return branches

    def _made(self, entry: Entry) -> Path | None:
        """The record about an input; None for a file that no rule made, and where the record is gone."""
        if path := self.of_output.get(entry.version or entry.sha256):
            return path
        return entry.file if entry.file in self.records else None  # a record itself

    def _branch(self, entry: Entry, made: Path | None, opened: dict[Path, None]) -> Tree:
        if made is None:
            self.lines += 1
            size = f", {size_text(entry.bytes)}" if entry.bytes else ""
            about = f"sha256 {entry.sha256[:12]}…" if entry.sha256 else entry.revision
            about = f"{entry.version}, whose record is gone" if entry.version else about
            return Tree(f"{entry.path}{size}, {about}")
        if made in opened:
            del opened[made]
            return self.tree(made)
        return Tree(f"{self._line(made)}, as above")


def lineage_part(run: Run) -> Part:
    """The tree of each checkpoint that no later one was trained from."""
    checkpoints = {path: record for path, record in run.records.items() if record.kind == "checkpoint"}
    used = {entry.version for record in checkpoints.values() for entry in record.inputs if entry.version}
    ends = [path for path, record in checkpoints.items() if record.version not in used]
    if not ends:
        return Part("Lineage", [Text("No training is finished, so there is no checkpoint to trace back.")])
    origin = Origin(run.records)
    text = (
        "What each checkpoint was made from, down to the raw files, by the hashes in the records beside them."
    )
    return Part("Lineage", [Text(text), *(origin.tree(path) for path in ends)])
