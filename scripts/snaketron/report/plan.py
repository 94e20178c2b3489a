"""The plan of a configuration as a person reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from snaketron.config import Parallel
from snaketron.graph.planned import Plan, PlannedCorpus, PlannedTraining
from snaketron.report.tables import table
from snaketron.sizes.layout import layout_words
from snaketron.sizes.published import Compared
from snaketron.wording import BYTES, large, short_duration, some

KINDS = ("experts", "TP", "CP", "PP", "DP")  # of what a GPU sends
MEMORY = ("weights", "gradients", "main_weights", "moments", "activations", "recordings", "total")


def markdown(plan: Plan) -> str:
    """The plan that `graph.plan` makes, in tables."""
    trainings, jobs = plan["trainings"], plan["jobs"]
    counted = jobs | {"total": sum(jobs.values())}
    parts = [
        "# Plan",
        "## Jobs\n\n" + table(["rule", "jobs"], [[rule, f"{n:,}"] for rule, n in counted.items()]),
        *_not_listed([name for name in plan["not_listed"] if name not in plan["missing"]]),
        *_missing(plan["missing"]),
        "## Trainings\n\n" + _trainings(trainings),
        "## Time\n\n" + _time(trainings),
        "## Memory of a process\n\n" + _memory(trainings),
        *_steps(trainings),
        *_sent(trainings),
        "## Text\n\n" + _text(plan),
        "## Disk\n\n" + _disk(plan["disk"]),
    ]
    return "\n\n".join(parts) + "\n"


def _not_listed(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    return [
        f"The files of {some(names, 5)} are not known yet; each counts as one file and one shard. "
        "`python scripts/lock_sources.py` with the same --configfile lists those of the hub and of stores."
    ]


def _missing(said: Mapping[str, str]) -> list[str]:
    if not said:
        return []
    lines = [f"- {line}" for of_source in said.values() for line in of_source.splitlines()]
    head = f"A run stops at {some(list(said), 5)}, of this machine; each counts as one file and one shard:"
    return ["\n".join([head, "", *lines])]


def _alike(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Trainings whose rows differ in their names alone, in one row."""
    names: dict[tuple[str, ...], list[str]] = {}
    for name, *cells in rows:
        names.setdefault(tuple(cells), []).append(name)
    return [[_joined(of_row), *cells] for cells, of_row in names.items()]


def _joined(names: Sequence[str]) -> str:
    """Stages in a list that names their section once: `pretrain/broad, focused`."""
    first, *others = names
    section = f"{first.partition('/')[0]}/"
    return ", ".join([first, *(name.removeprefix(section) for name in others)])


def _number(number: float | None) -> str:
    return "-" if number is None else large(number)


def _bytes(number: float | None) -> str:
    return "-" if number is None else large(number, BYTES)


def _trainings(trainings: Sequence[PlannedTraining]) -> str:
    rows = [
        [
            one["name"] + (" (on request)" if one["on_request"] else ""),
            f"{one['steps']:,}",
            large(one["tokens"]),
            f"{one['seq_length']:,}",
            f"{one['global_batch_size']:,}",
            large(one["parameters"]),
            large(one["active_parameters"]),
            _number(one["adapter_parameters"]),
            f"{one['flops_per_token'] / 1e9:,.4g}",
            f"{one['flops']:.3g}",
        ]
        for one in trainings
    ]
    header = ["training", "steps", "tokens", "length", "batch", "parameters", "active", "adapters"]
    return table([*header, "GFLOP a token", "FLOP"], _alike(rows))


def _hours(time: float | None) -> str:
    return "-" if time is None else short_duration(3600 * time)


def _time(trainings: Sequence[PlannedTraining]) -> str:
    rows, stated = [], list[str]()
    sources = dict.fromkeys(one["published_source"] for one in trainings if one["published_source"])
    for one in trainings:
        lies = layout_words(Parallel(**one["parallel"])) or "-"
        known = one["hours"] is not None
        speed = one["tokens_per_second_per_process"]
        rows.append(
            [
                one["name"],
                f"{one['nodes']:,}",
                f"{one['processes']:,}",
                lies,
                f"{speed:,.0f}" if known else "-",
                _hours(one["hours"]),
                f"{one['process_hours']:,.1f}" if known else "-",
                *([_hours(one["published_hours"])] if sources else []),
            ]
        )
        if one["speed_source"] == "stated":
            stated.append(one["name"])
    header = ["training", "nodes", "processes", "layout", "tokens/s of each", "time", "hours of all"]
    header += ["time as published"] if sources else []
    told = [f"- {_joined(stated)}: at the stated tokens_per_second_per_gpu"] if stated else []
    if sources and len(stated) < len(trainings):
        told.append(f"- {'the others' if stated else 'tokens/s'}: {_ESTIMATE}")
    told += [f"- as published, to compare: {source}" for source in sources]
    return "\n\n".join([table(header, _alike(rows)), *(["\n".join(told)] if told else [])])


_ESTIMATE = (
    "the estimate of a step below, with experts loaded evenly; `--published` shows how near such estimates "
    "are to what was measured"
)


def _memory(trainings: Sequence[PlannedTraining]) -> str:
    rows, lines, stages = [], [], dict[tuple[int, ...], list[str]]()
    parts = [part for part in MEMORY if part != "recordings" or any(one["memory"][part] for one in trainings)]
    for one in trainings:
        memory = one["memory"]
        fits = {None: "not checked", True: "yes", False: "no"}[memory["fits"]]
        rows.append([one["name"], *(_bytes(memory[part]) for part in parts), _bytes(memory["limit"]), fits])
        if memory["fits"] is False:
            would = one["why_none_fits"] or f"What would: {one['change_that_fits']}"
            lines.append(f"- {one['name']} does not fit. {would}")
        if len(one["layers_of_stages"]) > 1:
            stages.setdefault(tuple(one["layers_of_stages"]), []).append(one["name"])
    for layers, names in stages.items():
        lines.append(f"- {_joined(names)}: pipeline stages of {some(layers)} layers")
    header = ["training", *(part.replace("_", " ") for part in parts), "limit", "fits"]
    return "\n\n".join([table(header, _alike(rows)), *(["\n".join(lines)] if lines else [])])


def _steps(trainings: Sequence[PlannedTraining]) -> list[str]:
    """The estimated step of each training, where the GPU is known."""
    known = {one["name"]: step for one in trainings if (step := one["step"])}
    if not known:
        return []
    all_terms = next(iter(known.values()))
    terms = [term for term in all_terms if any(step[term] for step in known.values())]
    rows = [[name, *(_seconds(step[term]) for term in terms)] for name, step in known.items()]
    return ["## A step (s), by the estimate\n\n" + table(["training", *terms], _alike(rows))]


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g}" if seconds >= 0.0005 else "0"


def _sent(trainings: Sequence[PlannedTraining]) -> list[str]:
    """What a GPU sends to others in a step, where the GPU is known and there are others."""
    rows = []
    for one in trainings:
        if not (sent := one["sent"]) or not (step := one["step"]):
            continue
        links = {link: sum(moved[link] for moved in sent.values()) for link in ("nvlink", "network")}
        if any(links.values()):
            kinds = [_bytes(moved["nvlink"] + moved["network"]) for moved in sent.values()]
            speed = links["network"] / step["total"]
            a_second = f"{large(speed, BYTES)}/s" if speed else "-"
            rows.append([one["name"], *kinds, *map(_bytes, links.values()), a_second])
    header = ["training", *KINDS, "over NVLink", "over the network", "network a second"]
    return ["## Sent by a GPU in a step, by the estimate\n\n" + table(header, _alike(rows))] if rows else []


def _text(plan: Plan) -> str:
    """A row for each corpus, with its share of each blend; phases may have the same one."""
    blends: dict[tuple[Any, ...], list[str]] = {}
    taken: dict[str, float] = {}
    for one in plan["trainings"]:
        if parts := one["corpora"]:
            shares = tuple((corpus, part["share"]) for corpus, part in parts.items())
            blends.setdefault(shares, []).append(one["name"].rpartition("/")[2])
            for corpus, part in parts.items():
                taken[corpus] = taken.get(corpus, 0) + part["tokens"]
    rows = []
    for corpus, tokens in taken.items():
        there = plan["corpora"][corpus]
        known = there["train_tokens"] or there["estimated_tokens"]
        of_blends = [dict(blend).get(corpus) for blend in blends]
        rows.append(
            [
                corpus,
                *("-" if share is None else f"{share:.1%}" for share in of_blends),
                large(tokens),
                _number(there["train_tokens"]) if there["train_tokens"] else _about(there),
                f"{tokens / known:,.2f}" if known else "-",
                "-" if there["shards"] is None else f"{there['shards']:,}",
                _bytes(there["raw_bytes"]),
            ]
        )
    phases = [f"{first} and {len(more)} more" if more else first for first, *more in blends.values()]
    return table(["corpus", *phases, "tokens taken", "tokens there", "epochs", "shards", "raw files"], rows)


def _about(corpus: PlannedCorpus) -> str:
    """The tokens of a corpus before they are counted."""
    estimated = corpus["estimated_tokens"]
    return f"about {large(estimated)}" if estimated else "-"


def _disk(disk: Mapping[str, Any]) -> str:
    rows = [
        [what.replace("_", " "), ("about " if what in disk["estimated"] else "") + _bytes(size)]
        for what, size in disk.items()
        if what != "estimated"
    ]
    return table(["what", "size"], rows)


def comparison(numbers: Sequence[Compared]) -> str:
    """Published numbers beside the estimates."""
    rows = [
        [
            one.what,
            *(f"{n:,.6g}" if n < 1e6 else large(n) for n in (one.published, one.estimate)),
            one.unit,
            f"{one.estimate / one.published - 1:+.2%}",
            one.source,
        ]
        for one in numbers
    ]
    header = [
        "Nemotron 3, and the model of the benchmarks",
        "measured",
        "estimate",
        "unit",
        "difference",
        "source",
    ]
    return table(header, rows) + "\n"
