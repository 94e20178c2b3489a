"""What a whole run did, from the records of its artifacts: data, losses, packing, time, answers."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from snaketron.files import read_json
from snaketron.lineage import record as lineage
from snaketron.report.page import table

ANSWERS = "answers"  # directory of a version, with a file a step


def summarize(checkpoint: Path) -> str:
    """Markdown about a checkpoint and everything that it was made from.

    Follows the inputs of the lineage records, so the data must still lie where it was.
    """
    last = lineage.read(checkpoint / "record.json")
    stages, records = [], defaultdict(list)
    for record in [*lineage.ancestors(last["inputs"]).values(), last]:
        if record["kind"] == "checkpoint":
            stages.append(record)
        else:
            records[record["kind"]].append(record)
    parts = [
        f"# {checkpoint}",
        _training(stages),
        *_mix(last),
        *_performance(stages),
        _text(records["tokens"]),
        _conversations(records["render_chat"], records["pack_sft"]),
        _time(stages, records),
    ]
    if steps := sorted((checkpoint / ANSWERS).glob("step_*.json")):
        parts.append(_answers(read_json(steps[0]), read_json(steps[-1])))
    return "\n\n".join(parts) + "\n"


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _training(stages: list[dict[str, Any]]) -> str:
    rows = []
    for stage in stages:
        counts = stage["counts"]
        losses = [counts[key] for key in ("valid_loss_before", "valid_loss_after", "test_loss")]
        speed = counts["tokens"] / max(counts["train_seconds"], 1e-9)
        rows.append(
            [
                stage["name"],
                f"{counts['iterations']:,}",
                f"{counts['tokens']:,}",
                *map(_number, losses),
                f"{speed:,.0f}",
            ]
        )
    header = ["training", "steps", "tokens", "valid loss before", "after", "test loss", "tokens/s"]
    return "## Training\n\n" + table(header, rows)


def _mix(last: dict[str, Any]) -> list[str]:
    """What the last training took from each source, against the weights; nothing for one without sources."""
    rows = [
        [
            name,
            f"{source['weight']:.1%}",
            f"{source['share']:.1%}",
            *(f"{source[key]:,}" for key in ("packs", "conversations", "tokens", "trained_tokens")),
            f"{source['epochs']:.2f}",
            _number(source["valid_loss"]),
        ]
        for name, source in last["counts"].get("sources", {}).items()
    ]
    header = [
        "chat source",
        "wanted",
        "trained",
        "packs",
        "conversations",
        "tokens",
        "trained tokens",
        "epochs",
    ]
    return ["## Mix\n\n" + table([*header, "valid loss"], rows)] if rows else []


def _performance(stages: list[dict[str, Any]]) -> list[str]:
    """Speed and memory of a process (a GPU), and where its time went; nothing for records without them."""
    keys = ("tokens_per_second_per_process", "tflops_per_process", "peak_memory_gib")
    seconds = ("step_seconds", "data_seconds", "checkpoint_seconds")
    rows = [
        [stage["name"], f"{counts[keys[0]]:,.0f}", f"{counts[keys[1]]:.3g}", f"{counts[keys[2]]:.1f}"]
        + [f"{counts[key]:,.1f}" for key in seconds]
        for stage in stages
        if keys[0] in (counts := stage["counts"])
    ]
    header = ["of a process", "tokens/s", "model TFLOP/s", "peak GiB", "s in steps", "waiting for data"]
    return ["## Performance\n\n" + table([*header, "in checkpoints"], rows)] if rows else []


def _text(records: list[dict[str, Any]]) -> str:
    corpora: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        corpora[record["settings"]["corpus"]].append(record["counts"])
    rows = []
    for corpus, counts in sorted(corpora.items()):
        tokens = [sum(c[split]["tokens"] for c in counts) for split in ("train", "valid", "test")]
        documents, megabytes = sum(c["documents"] for c in counts), sum(c["bytes"] for c in counts) / 1e6
        rows.append(
            [corpus, str(len(counts)), f"{documents:,}", f"{megabytes:.1f}", *(f"{t:,}" for t in tokens)]
        )
    header = ["corpus", "shards", "documents", "MB", "train tokens", "valid", "test"]
    return "## Text\n\n" + table(header, rows) + _dropped([r["counts"]["dropped"] for r in records])


def _conversations(rendered: list[dict[str, Any]], packed: list[dict[str, Any]]) -> str:
    rows, dropped = [], [r["counts"]["dropped"] for r in rendered]
    for source in sorted({r["settings"]["source"] for r in packed}):
        records = [r for r in packed if r["settings"]["source"] == source]
        splits = [s for r in records for s in r["counts"]["splits"].values()]
        packs, tokens, trained, kept = (
            sum(s[key] for s in splits) for key in ("packs", "tokens", "trained_tokens", "packed")
        )
        room = packs * records[0]["settings"]["pack_size"]
        efficiency = f"{tokens / room:.1%}" if room else "-"
        rows.append([source, f"{kept:,}", f"{packs:,}", f"{tokens:,}", f"{trained:,}", efficiency])
        dropped += [s["dropped"] for s in splits]
    header = ["chat source", "conversations", "packs", "tokens", "trained tokens", "packing efficiency"]
    cut = sum(s["cut"] for r in packed for s in r["counts"]["splits"].values())
    sentence = f" Cut at the size of a pack: {cut:,}." if cut else ""
    return "## Conversations\n\n" + table(header, rows) + _dropped(dropped) + sentence


def _dropped(counts: list[dict[str, int]]) -> str:
    """A sentence about what was dropped, by reason."""
    totals: dict[str, int] = defaultdict(int)
    for count in counts:
        for reason, number in count.items():
            totals[reason] += number
    reasons = [
        f"{number:,} {reason.replace('_', ' ')}" for reason, number in sorted(totals.items()) if number
    ]
    return f"\n\nDropped: {', '.join(reasons) or 'nothing'}."


def _time(stages: list[dict[str, Any]], records: dict[str, list[dict[str, Any]]]) -> str:
    rows = [
        [kind, str(len(found)), f"{sum(r['seconds'] for r in found):.1f}"]
        for kind, found in sorted(records.items())
    ]
    rows += [[stage["name"], "1", f"{stage['seconds']:.1f}"] for stage in stages]
    return "## Time\n\n" + table(["made", "jobs", "seconds"], rows)


def _answers(before: list[dict[str, str]], after: list[dict[str, str]]) -> str:
    """Prompts of the validation split with what the base and the tuned model make of them."""
    parts = ["## Answers"]
    for base, tuned in zip(before, after, strict=True):
        texts = {name: base[name] for name in ("prompt", "reference")}
        texts |= {"base model": base["answer"], "tuned model": tuned["answer"]}
        quoted = {name: text.strip().replace("\n", "\n    ") for name, text in texts.items()}
        parts.append("\n\n".join(f"{name}:\n\n    {text}" for name, text in quoted.items()))
    return "\n\n".join(parts)
