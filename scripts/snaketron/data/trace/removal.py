"""A request to remove documents: what holds them or was trained on them, and has to be made again without."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from snaketron.data.drops import place
from snaketron.data.trace.fate import READERS, Fate, fates
from snaketron.lineage.catalogue import Catalogue, Made
from snaketron.lineage.uses import reach, source
from snaketron.lineage.words import kinds, steps
from snaketron.log import UserError
from snaketron.wording import duration, plural, some

LIST = ".txt"  # the name of a list of documents ends so; no raw file's does
_LINE = re.compile(r"(?P<file>.+?)(?::(?: row )?(?P<row>\d+))?")


@dataclass
class Removal:
    """What would have to be made again; each in an order in which it may be."""

    again: list[Made] = field(default_factory=list)
    unseen: list[Made] = field(default_factory=list)  # trainings on a changed blend that saw none of it
    influenced: list[Made] = field(default_factory=list)  # by a tokenizer or a list; they hold nothing of it
    fates: list[Fate] = field(default_factory=list)
    files: list[str] = field(default_factory=list)  # that are removed whole

    @property
    def trainings(self) -> list[Made]:
        return [made for made in self.again if made.record.is_training]


def requested(path: Path) -> list[tuple[str, int | None]]:
    """The documents of a list: a line each, `FILE` or `FILE:ROW` (from 1), as errors name them."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a list of documents that can be read ({error})") from None
    found: list[tuple[str, int | None]] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        match = _LINE.fullmatch(line)
        assert match is not None
        row = match["row"]
        found.append((match["file"], int(row) if row else None))
    if not found:
        raise UserError(f"{path}: names no documents; write a line `FILE` or `FILE:ROW` for each")
    return found


def removal(catalogue: Catalogue, documents: Iterable[tuple[str, int | None]]) -> Removal:
    """What has to be made again without some documents: whole files, and rows of files."""
    rows: dict[str, set[int] | None] = {}  # by file; None for a whole one
    for name, row in documents:
        listed = rows.setdefault(name, set())
        if row is None or listed is None:
            rows[name] = None
        else:
            listed.add(row)
    sources = {name: source(catalogue, name) for name in rows}
    found = Removal(files=[name for name, listed in rows.items() if listed is None])
    for name, listed in rows.items():
        if listed:
            found.fates += fates(catalogue, sources[name], sorted(listed))
    whole = {made.digest for made in reach(catalogue, [sources[name] for name in found.files]).holders}
    reached = reach(catalogue, sources.values())
    found.influenced = reached.influenced
    again: set[str] = set()
    for made in reached.holders:
        blend_changes, must = _must(catalogue, made, found.fates, whole, again)
        if must:
            again.add(made.digest)
            found.again.append(made)
        elif blend_changes and made.record.is_training:
            found.unseen.append(made)
    return found


def _must(
    catalogue: Catalogue, made: Made, found: Sequence[Fate], whole: set[str], again: set[str]
) -> tuple[bool, bool]:
    """Whether an input of a job changes, and whether the job has to run again."""
    kind = made.record.kind
    makers = [(entry, catalogue.made_by(entry, made)) for entry in made.record.inputs]
    changed = {entry.name for entry, maker in makers if maker and maker.digest in again}
    if made.record.is_training:
        seen = any(t.made is made and (t.samples or t.problem) for fate in found for t in fate.trainings)
        whole_file = made.digest in whole and "blend" in changed
        return bool(changed), seen or whole_file or bool(changed - {"blend"})
    if made.digest in whole and kind in (*READERS, "filtered", "tokenizer"):
        return True, kind != "tokenizer"
    if kind in READERS:
        return True, any(fate.shard is made and fate.splits for fate in found)
    if kind == "filtered":  # later steps may have removed what it holds
        passed = [fate for fate in found if fate.splits or fate.why.startswith("removed by curation")]
        shards = {fate.shard.digest: fate.shard for fate in passed}
        return True, any(made in catalogue.ancestors(shard) for shard in shards.values())
    if kind == "checkpoint":  # merged or imported: its blend is only for a validation
        changed -= {"blend"}
    return bool(changed), bool(changed)


# -------------------------------------------------------------------------------------------- in words


def told(found: Removal) -> list[str]:
    """The answer in lines."""
    lines = []
    if found.files:
        lines.append(f"without {plural(len(found.files), 'file')}: {some(found.files)}")
    if found.fates:
        lines.append(f"without {plural(len({(fate.file, fate.row) for fate in found.fates}), 'document')}")
    dropped = [
        f"  {place(Path(fate.file), fate.row)} is not in {fate.shard.title}: {fate.why}"
        for fate in found.fates
        if not fate.splits
    ]
    lines += dict.fromkeys(dropped)  # two configurations may have a shard of one name
    if not found.again:
        return [*lines, "nothing has to be made again"]
    lines += ["to make again:", *kinds(found.again)]
    lines += ["trainings, each from its beginning:"] if found.trainings else []
    lines += [f"  {made.version}: {_seen(made, found)}" for made in found.trainings]
    lines.append(f"estimate: {estimate(found)}")
    if found.unseen:
        unseen = some([made.version for made in found.unseen])
        lines.append(f"trained on none of them, though Snakemake sees that the blend changes: {unseen}")
    if found.influenced:
        lines.append(
            "not counted, as no text of them is there: a tokenizer or list that read them was used for"
        )
        lines += kinds(found.influenced)
    return lines


def _seen(made: Made, found: Removal) -> str:
    numbers = sorted({s for fate in found.fates for t in fate.trainings if t.made is made for s in t.steps})
    number = made.record.settings["train_iters"]
    if numbers:
        return f"saw them {steps(numbers, number)}"
    problems = [t.problem for fate in found.fates for t in fate.trainings if t.made is made and t.problem]
    if problems:
        return f"{plural(number, 'step')}; {problems[0]}"
    on = "the files" if found.files else "what saw them"
    return f"{plural(number, 'step')}, built on {on}"


def estimate(found: Removal) -> str:
    """The steps, and what the jobs took when they ran."""
    steps = sum(made.record.settings["train_iters"] for made in found.trainings)
    seconds = sum(made.record.seconds for made in found.again)
    cost: dict[str, float] = {}
    for made in found.again:
        for name, value in made.record.provenance.get("cost", {}).items():
            cost[name] = cost.get(name, 0) + value
    hours = [
        f"{value / 3600:,.2f} {name.removesuffix('_seconds').upper()} hours" for name, value in cost.items()
    ]
    jobs = f"{plural(len(found.again), 'job')} that took {duration(seconds)} one after the other"
    return ", ".join([f"{steps:,} training steps", jobs, *hours])
