"""The fates of documents in lines for a terminal, and as JSON."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from snaketron.data.drops import place
from snaketron.data.trace.fate import Fate
from snaketron.lineage.catalogue import Catalogue, Made
from snaketron.lineage.uses import Source, called, reach
from snaketron.lineage.words import steps
from snaketron.wording import some


def told(catalogue: Catalogue, fates: Iterable[Fate]) -> list[str]:
    """What became of each document."""
    lines, fates = [], list(fates)
    shards = {fate.shard.digest: fate.shard for fate in fates}
    titles = dict(zip(shards, called([*shards.values()], lambda made: made.title), strict=True))
    for fate in fates:
        lines.append(f"{place(Path(fate.file), fate.row)} in {titles[fate.shard.digest]}")
        if fate.splits:
            parts = [f"{n} of {split}" for n, split in zip(fate.numbers, fate.splits, strict=True)]
            lines.append(f"  sequence {some(parts)}")
        if fate.why:
            lines.append(f"  not trained on: {fate.why}")
        for training in fate.trainings:
            when = training.problem or steps(training.steps, training.num_steps)
            lines.append(f"  {training.made.version}: {when}")
        if built := _built_on(catalogue, fate):
            lines.append(f"  built on these: {some(built)}")
    return lines


def as_json(catalogue: Catalogue, fates: Iterable[Fate]) -> list[dict[str, Any]]:
    return [
        {
            "file": fate.file,
            "row": fate.row,
            "shard": fate.shard.record.name,
            "sequences": [
                {"split": split, "number": n} for n, split in zip(fate.numbers, fate.splits, strict=True)
            ],
            "not_trained": fate.why or None,
            "trainings": [
                {
                    "version": training.made.version,
                    "samples": training.samples,
                    "steps": training.steps,
                    "of_steps": training.num_steps,
                    "problem": training.problem or None,
                }
                for training in fate.trainings
            ],
            "built_on_these": _built_on(catalogue, fate),
        }
        for fate in fates
    ]


def _built_on(catalogue: Catalogue, fate: Fate) -> list[str]:
    """The checkpoints, exports and evaluations of what trained on a document, without these trainings."""
    trained = [training.made for training in fate.trained]
    sources = [Source(made.version, made.version, catalogue.users_of(made)) for made in trained]
    own = {made.digest for made in trained}
    found = (made for made in reach(catalogue, sources).holders if made.digest not in own)
    return [_named(made) for made in found]


def _named(made: Made) -> str:
    """A checkpoint by its version, the others with what they are: evaluations have versions, too."""
    kind, name = made.record.kind, made.version or made.record.name
    return name if kind == "checkpoint" else f"{kind} {name}"
