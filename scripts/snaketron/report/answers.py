"""What trainings answered to held-out prompts: how many exactly as in the data, and what they said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from snaketron.config.data import CALL
from snaketron.report.blocks import UNKNOWN, Block, Folded, Part, Quotes, Text
from snaketron.report.measured import across
from snaketron.report.runs import Run, Stage
from snaketron.wording import plural

MAX_ANSWERS = 20  # prompts of a training whose answers are shown

type Answers = list[dict[str, str]]


@dataclass
class Kind:
    """Prompts whose reference calls a function, or those whose reference does not."""

    places: list[int] = field(default_factory=list)  # of the prompts
    before: int = 0  # answered exactly
    after: int = 0
    cut: int = 0  # afterwards, at the longest answer that was allowed


def kinds(before: Answers, after: Answers) -> dict[str, Kind]:
    """How many prompts of each kind were answered exactly, by the base and by what was trained on it."""
    found: dict[str, Kind] = {}
    for place, base in enumerate(before):
        kind = found.setdefault("calls" if CALL in base["reference"] else "texts", Kind())
        kind.places.append(place)
        kind.before += base["answer"] == base["reference"]
        if place < len(after):
            kind.after += after[place]["answer"] == base["reference"]
            kind.cut += is_cut(after[place])
    return dict(sorted(found.items()))


def exact_answers(stage: Stage) -> str:
    """How many held-out prompts a training answers exactly, in words; nothing before it has answered."""
    answers = stage.answers()
    if len(answers) < 2:
        return ""
    found = kinds(answers[0][1], answers[-1][1])
    return ", ".join(
        f"{kind.after} of {len(kind.places)} {name}" + (f" ({kind.cut} cut)" if kind.cut else "")
        for name, kind in found.items()
    )


def answers_part(runs: Sequence[Run]) -> Part:
    """Prompts of the validation split with the answers before and after tuning."""
    header = ["training", "held out", "asked", "exact before", "exact after", "cut after"]
    blocks = across("Answers that are exactly those of the data", header, runs, _rows, names=2)
    for run in runs:
        for stage in run.stages:
            blocks += _answers(stage, f", {run.name}" if len(runs) > 1 else "")
    if not blocks:
        return Part("Answers", [Text("No training has answered a prompt yet (sft.num_samples).")])
    return Part("Answers", blocks)


def _rows(run: Run) -> list[list[str]]:
    rows = []
    for stage in run.stages:
        if answers := stage.answers():
            for name, kind in kinds(answers[0][1], answers[-1][1]).items():
                after = [f"{kind.after}", f"{kind.cut}"] if len(answers) > 1 else [UNKNOWN, UNKNOWN]
                rows.append([stage.name, name, f"{len(kind.places)}", f"{kind.before}", *after])
    return rows


def _answers(stage: Stage, of_run: str) -> list[Block]:
    """The first prompt of each kind, and others that are opened on demand."""
    answers = stage.answers()
    if not answers:
        return []
    first = [kind.places[0] for kind in kinds(answers[0][1], answers[-1][1]).values()]
    others = [place for place in range(len(answers[0][1])) if place not in first]
    shown, left = others[: MAX_ANSWERS - len(first)], len(others) - MAX_ANSWERS + len(first)
    blocks: list[Block] = [quotes(stage, place, of_run) for place in first]
    if shown:
        rest = [quotes(stage, place, of_run) for place in shown]
        blocks.append(Folded(f"{plural(len(shown), 'more prompt')} of {stage.name}{of_run}", rest))
    if left > 0:
        blocks.append(Text(f"{left} more are in ckpt/{stage.name}/answers{of_run}."))
    return blocks


def quotes(stage: Stage, place: int, of_run: str = "") -> Quotes:
    """A prompt, its reference, and the answers before and after."""
    answers = stage.answers()
    (first, before), (last, after) = answers[0], answers[-1]
    base = before[place]
    texts = [("prompt", base["prompt"]), ("reference", base["reference"])]
    texts.append((_title(first, base), base["answer"]))
    if last != first and place < len(after):
        texts.append((_title(last, after[place]), after[place]["answer"]))
    title = f"Prompt {place + 1} of {stage.name}{of_run}"
    return Quotes(title, [(name, text.strip()) for name, text in texts])


def _title(step: int, entry: dict[str, str]) -> str:
    return f"answer after step {step}" + (", cut" if is_cut(entry) else "")


def is_cut(entry: Mapping[str, str]) -> bool:
    """Whether an answer ends at the longest length that was allowed; an entry of before does not say."""
    return entry.get("finish_reason") == "length"
