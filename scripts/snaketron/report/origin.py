"""What a checkpoint was made from, down to the raw files, as a tree that opens."""

from __future__ import annotations

import contextlib

from snaketron.lineage.catalogue import Catalogue, read_all
from snaketron.lineage.record import Entry
from snaketron.lineage.tree import Branch, grow, troubles
from snaketron.report.blocks import Part, Text, Tree
from snaketron.report.runs import Run
from snaketron.wording import size_text

MOST_FILES = 100  # raw files of a branch that have a line each


def lineage_part(run: Run) -> Part:
    """The tree of each checkpoint that no later one was trained from."""
    with contextlib.chdir(run.directory):
        catalogue = Catalogue(read_all(run.records), [run.directory])
        checkpoints = [made for made in catalogue.all if made.record.kind == "checkpoint"]
        used = {entry.version for made in checkpoints for entry in made.record.inputs if entry.version}
        ends = [made for made in checkpoints if made.version not in used]
        trees = [_tree(catalogue, branch) for branch in grow(catalogue, *ends)]
    if not trees:
        return Part("Lineage", [Text("No training is finished, so there is no checkpoint to trace back.")])
    text = (
        "What each checkpoint was made from, down to the raw files, by the hashes in the records beside them."
    )
    return Part("Lineage", [Text(text), *trees])


def _tree(catalogue: Catalogue, branch: Branch) -> Tree:
    title = f"{branch.role}: {branch.title}" if branch.role else branch.title
    if branch.is_above:
        return Tree(title, about="as above")
    files = [_file(entry) for _, entry in branch.raw]
    below = [Tree(line) for line in troubles(catalogue, branch)]
    if len(files) > 1:
        below += map(Tree, files[:MOST_FILES])
        below += [Tree(f"{more:,} more")] if (more := len(files) - MOST_FILES) > 0 else []
    below += [_tree(catalogue, inner) for inner in branch.branches]
    return Tree(title, below, about=files[0] if len(files) == 1 else branch.place)


def _file(entry: Entry) -> str:
    """An input that no job made: where it lies, its size and what identifies it."""
    size = size_text(entry.bytes) if entry.bytes else ""
    digest = f"sha256 {entry.sha256[:12]}" if entry.sha256 else entry.revision
    return ", ".join(filter(None, (entry.path, size, digest)))
