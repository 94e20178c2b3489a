"""Answers about uses in lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from snaketron.lineage.catalogue import Made
from snaketron.lineage.uses import Reach, Source, by_kind
from snaketron.wording import plural, some

KINDS = {
    "tokens": "tokenized shards",
    "render_chat": "rendered shards",
    "pack_sft": "packed shards",
    "registered_tokens": "tokens from elsewhere",
    "registered_packs": "packs from elsewhere",
    "blend_sft": "blends of SFT",
    "blend": "blends",
    "index": "sample indices",
    "checkpoint": "checkpoints",
    "export": "exports",
    "evaluation": "evaluations",
}


def used(source: Source, found: Reach) -> list[str]:
    """The jobs that used a source, in words."""
    lines = [f"{source.name} (sha256 {source.identity[:12]})"]
    if not found.holders and not found.influenced:
        return [*lines, "  no job used it"]
    lines += kinds(found.holders)
    if found.influenced:
        lines.append("  no text of it, but an influence, by a tokenizer or a list of what to remove:")
        lines += kinds(found.influenced, "    ")
    return lines


def kinds(found: Iterable[Made], indent: str = "  ") -> list[str]:
    """A line for each kind of job."""
    return [f"{indent}{KINDS.get(kind, kind)}: {some(names)}" for kind, names in by_kind(found).items()]


def steps(numbers: Sequence[int], num_steps: int) -> str:
    """At which of its steps a training saw something.

    >>> steps([4], 10), steps([4, 6], 10), steps([], 10)
    ('at step 4 of 10', 'at 2 of 10 steps: 4, 6', 'at none of its 10 steps')
    """
    if not len(numbers):
        return f"at none of its {plural(num_steps, 'step')}"
    if len(numbers) == 1:
        return f"at step {numbers[0]} of {num_steps}"
    return f"at {len(numbers)} of {num_steps} steps: {some(list(numbers))}"
