"""The layouts that a search has found, as a person reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from snaketron.config import Training
from snaketron.report.tables import table
from snaketron.sizes.layout import layout_sizes, layout_words
from snaketron.sizes.search import Found, place
from snaketron.wording import BYTES, large, plural

SHOWN = 12


def markdown(training: Training, on: str, found: Sequence[Found], own: Found, why_none: str = "") -> str:
    """The first of the layouts found, and the configured one.

    Args:
        on: the GPUs, in words.
        own: the configured layout, which may need other GPUs.
        why_none: what to say where none was found.
    """
    parts = [f"# Layouts of {training.name} on {on}"]
    best = {layout_sizes(one.parallel): one for one in reversed(found)}  # of each layout
    layouts, shown = len(best), sorted(best.values(), key=lambda one: one.step.total)[:SHOWN]
    if found:
        parts += [f"{plural(layouts, 'layout')} fit. The fastest, by the estimate:", _layouts(shown)]
        parts += ["Seconds of a step:", _terms(shown)]
    else:
        parts.append(f"No layout fits. {why_none}")
    number = place(found, own.parallel)
    words = layout_words(own.parallel) or "one process"
    parts.append(
        f"The configured layout ({words}): "
        + (f"place {number} of {layouts}." if number and found else "not among them.")
    )
    return "\n\n".join(parts) + "\n"


def _layouts(found: Sequence[Found]) -> str:
    rows = [
        [
            f"{number}",
            layout_words(one.parallel) or "one process",
            f"{one.micro_batch_size}",
            ", ".join(one.recompute) or "-",
            large(one.peak_bytes, BYTES),
            f"{one.step.total:,.3g}",
            f"{one.tokens_per_second:,.0f}",
        ]
        for number, one in enumerate(found, start=1)
    ]
    header = ["", "layout", "micro-batch", "recompute", "memory", "step (s)", "tokens/s of each"]
    return table(header, rows)


def _terms(found: Sequence[Found]) -> str:
    terms = [asdict(one.step) for one in found]
    names = [name for name in terms[0] if any(step[name] >= 0.0005 * sum(step.values()) for step in terms)]
    rows = [[f"{i}", *(f"{step[name]:.3g}" for name in names)] for i, step in enumerate(terms, start=1)]
    return table(["", *names], rows)


def as_json(found: Sequence[Found]) -> list[dict[str, Any]]:
    return [
        one._asdict()
        | {"parallel": one.parallel.model_dump(), "recompute": list(one.recompute), "step": asdict(one.step)}
        for one in found
    ]
