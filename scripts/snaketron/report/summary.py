"""What a whole run did, from the records of its artifacts: data, losses, packing, time, answers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from snaketron.config.data import SPLITS
from snaketron.files import read_json
from snaketron.jobs.version import Version
from snaketron.lineage.record import Entry, Record, read
from snaketron.lineage.walk import ancestors, lost, why_lost
from snaketron.report.answers import is_cut, kinds
from snaketron.report.blocks import number
from snaketron.report.collect import Data, add_up
from snaketron.report.tables import table


def summarize(checkpoint: Path) -> str:
    """Markdown about a checkpoint and everything that it was made from.

    Follows the inputs of the lineage records, so the data must still lie where it was.
    """
    version = Version(checkpoint)
    last = read(version.record)
    records = [*ancestors(last.inputs).values(), last]
    stages = [record for record in records if record.kind == "checkpoint"]
    data = add_up(record for record in records if record.kind != "checkpoint")
    parts = [
        f"# {checkpoint}",
        _training(stages, lost(records)),
        *_mix(last),
        *_performance(stages),
        _text(data),
        _conversations(data),
        _time(stages, data),
    ]
    if steps := version.all_answers():
        parts.append(_answers(read_json(steps[0]), read_json(steps[-1])))
    return "\n\n".join(parts) + "\n"


def _training(stages: list[Record], gone: list[Entry]) -> str:
    rows = []
    for stage in stages:
        counts = stage.counts
        losses = [counts[key] for key in ("valid_loss_before", "valid_loss_after", "test_loss")]
        speed = counts["tokens"] / max(counts["train_seconds"], 1e-9)
        rows.append(
            [
                stage.name,
                f"{counts['iterations']:,}",
                f"{counts['tokens']:,}",
                *map(number, losses),
                f"{speed:,.0f}",
            ]
        )
    header = ["training", "steps", "tokens", "valid loss before", "after", "test loss", "tokens/s"]
    sentences = [f"{entry.path} is not listed: {why_lost(entry)}." for entry in gone]
    return "\n\n".join(["## Training", table(header, rows), *sentences])


def _mix(last: Record) -> list[str]:
    """Compare what the last training took from each source, or corpus, with the weights; empty without.

    A source that is held out as a whole has its validation loss alone.
    """
    sources = last.counts.get("sources", {})
    of_text = any("samples" in source for source in sources.values())
    keys = (
        ("samples", "trained_tokens") if of_text else ("packs", "conversations", "tokens", "trained_tokens")
    )
    rows = [
        [
            name,
            f"{source['weight']:.1%}",
            f"{source['share']:.1%}",
            *(f"{source[key]:,}" for key in keys),
            f"{source['epochs']:.2f}",
            number(source["valid_loss"]),
        ]
        for name, source in sources.items()
    ]
    held_out = last.counts.get("held_out", {})
    rows += [[name, *["-"] * (len(keys) + 3), number(loss)] for name, loss in held_out.items()]
    counted = [key.replace("_", " ") for key in keys]
    first = "corpus" if of_text else "chat source"
    header = [first, "wanted", "trained", *counted, "epochs", "valid loss"]
    if not rows:
        return []
    if of_text:
        return ["## Mix\n\n" + table(header, rows)]
    filled, room = sum(source["tokens"] for source in sources.values()), last.counts["tokens"]
    padding = f"Conversations fill {filled:,} of the {room:,} tokens of these packs; the rest is padding."
    return [f"## Mix\n\n{table(header, rows)}\n\n{padding}"]


def _performance(stages: list[Record]) -> list[str]:
    """Speed, memory and time of one process (a GPU); a training whose record lacks them gets no row."""
    keys = ("tokens_per_second_per_process", "tflops_per_process", "peak_memory_gib")
    seconds = ("step_seconds", "data_seconds", "checkpoint_seconds")
    rows = [
        [stage.name, f"{counts[keys[0]]:,.0f}", f"{counts[keys[1]]:.3g}", f"{counts[keys[2]]:.1f}"]
        + [f"{counts[key]:,.1f}" for key in seconds]
        for stage in stages
        if keys[0] in (counts := stage.counts)
    ]
    header = [
        "of a process",
        "median tokens/s",
        "model TFLOP/s",
        "peak GiB",
        "s in steps",
        "waiting for data",
    ]
    return ["## Performance\n\n" + table([*header, "in checkpoints"], rows)] if rows else []


def _text(data: Data) -> str:
    rows = []
    for corpus, text in sorted(data.texts.items()):
        tokens = [f"{text.tokens[split]:,}" for split in SPLITS]
        read = [f"{data.rows_read(corpus):,}", f"{text.megabytes:.1f}"] if text.read_here else ["-", "-"]
        rows.append([corpus, str(text.shards), *read, *tokens])
    header = ["corpus", "shards", "rows read", "MB", "train tokens", "valid", "test"]
    return "## Text\n\n" + table(header, rows) + _dropped(data, "read", "curate", "tokenize")


def _conversations(data: Data) -> str:
    rows = []
    for source, chats in sorted(data.chats.items()):
        numbers = (chats.conversations, chats.packs, chats.tokens, chats.trained)
        efficiency = f"{chats.efficiency:.1%}" if chats.packs else "-"
        rows.append([source, *(f"{number:,}" for number in numbers), efficiency])
    header = ["chat source", "conversations", "packs", "tokens", "trained tokens", "packing efficiency"]
    cut = sum(chats.cut for chats in data.chats.values())
    sentence = f" Cut at the size of a pack: {cut:,}." if cut else ""
    return "## Conversations\n\n" + table(header, rows) + _dropped(data, "render", "pack") + sentence


def _dropped(data: Data, *steps: str) -> str:
    """A sentence about what the steps dropped, by reason."""
    totals: Counter[str] = Counter()
    for removed in data.removed.values():
        if removed.step in steps:
            totals[removed.reason] += removed.documents
    reasons = [f"{number:,} {reason}" for reason, number in sorted(totals.items())]
    return f"\n\nDropped: {', '.join(reasons) or 'nothing'}."


def _time(stages: list[Record], data: Data) -> str:
    rows = [[kind, str(len(times)), f"{sum(times):.1f}"] for kind, times in sorted(data.seconds.items())]
    rows += [[stage.name, "1", f"{stage.seconds:.1f}"] for stage in stages]
    return "## Time\n\n" + table(["made", "jobs", "seconds"], rows)


def _answers(before: list[dict[str, str]], after: list[dict[str, str]]) -> str:
    """How many held-out prompts the base and the tuned model answer exactly, and the first of each kind."""
    found = kinds(before, after)
    rows = [
        [name, *map(str, (len(kind.places), kind.before, kind.after, kind.cut))]
        for name, kind in found.items()
    ]
    header = ["held out", "asked", "exact by the base", "exact after tuning", "cut after tuning"]
    parts = ["## Answers", table(header, rows)]
    for kind in found.values():
        base, tuned = before[kind.places[0]], after[kind.places[0]]
        texts = {f"{name}:": base[name] for name in ("prompt", "reference")}
        texts |= {f"base model:{_cut(base)}": base["answer"], f"tuned model:{_cut(tuned)}": tuned["answer"]}
        quoted = {title: text.strip().replace("\n", "\n    ") for title, text in texts.items()}
        parts.append("\n\n".join(f"{title}\n\n    {text}" for title, text in quoted.items()))
    return "\n\n".join(parts)


def _cut(entry: dict[str, str]) -> str:
    return " (cut)" if is_cut(entry) else ""
