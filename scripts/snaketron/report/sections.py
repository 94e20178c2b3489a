"""What is in the data of a run, from the lineage records: nothing is read again.

`collect` adds the records up, `sections` puts them into tables, and `markdown` and `html` write those.
"""

from __future__ import annotations

import base64
import html as escapes
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snaketron import files
from snaketron.data.split import SPLITS
from snaketron.lineage import record as lineage
from snaketron.report.run import table

MAX_EXAMPLES = 3  # of what was removed from a source for one reason
EXAMPLE_CHARACTERS = 100

# Steps of the data, in the order in which they come, and what a record of each is about.
STEPS = {
    "raw": "download",
    "tokenizer": "build tokenizer",
    "filtered": "filter",
    "exact_signature": "exact duplicates: hash",
    "exact_duplicates": "exact duplicates: find",
    "minhash_signature": "near duplicates: hash",
    "minhash_pairs": "near duplicates: compare",
    "near_duplicates": "near duplicates: join",
    "decontamination_index": "decontamination: index",
    "curated": "curate",
    "tokens": "tokenize",
    "blend": "blend text",
    "index": "index text",
    "render_chat": "render conversations",
    "pack_sft": "pack conversations",
    "blend_sft": "blend conversations",
}


@dataclass
class Removed:
    """What a step took out of a source for one reason."""

    source: str
    step: str
    reason: str
    documents: int = 0
    tokens: int | None = None  # None: not counted, because it was never tokenized
    examples: list[str] = field(default_factory=list)


@dataclass
class Text:
    """A corpus, summed over its shards."""

    shards: int = 0
    documents: int = 0  # rows read
    kept: Counter[str] = field(default_factory=Counter)  # sequences by split
    tokens: Counter[str] = field(default_factory=Counter)  # by split
    bytes: Counter[str] = field(default_factory=Counter)  # by split
    cut: int = 0  # long documents
    replaced: int = 0  # documents in which U+FFFD stands for what is no Unicode
    checked: int = 0  # documents that both encoders encoded alike
    encoders: Counter[str] = field(default_factory=Counter)  # shards by encoder
    lengths: Counter[int] = field(default_factory=Counter)  # sequences by the power of 2 below their tokens


@dataclass
class Curated:
    """What curation made of a corpus, summed over its shards."""

    documents: Counter[str] = field(default_factory=Counter)  # before and after
    tokens: Counter[str] = field(default_factory=Counter)  # before and after
    changed: int = 0  # documents in which something was replaced


@dataclass
class Chats:
    """A source of conversations, summed over its shards."""

    shards: int = 0
    rows: int = 0
    conversations: int = 0  # packed
    packs: int = 0
    room: int = 0  # tokens that the packs could hold
    tokens: int = 0
    trained: int = 0
    lengths: Counter[int] = field(default_factory=Counter)

    @property
    def efficiency(self) -> float:
        """Share of the room of the packs that is filled."""
        return self.tokens / self.room if self.room else 0.0

    @property
    def trained_share(self) -> float:
        """Share of the tokens that the assistant said."""
        return self.trained / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class Share:
    """A corpus in the training data of a phase."""

    corpus: str
    asked: float
    realised: float
    present: float
    taken: int  # tokens
    tokens: int
    epochs: float
    repeated: bool


@dataclass
class Data:
    """What the records say."""

    texts: dict[str, Text] = field(default_factory=dict)
    chats: dict[str, Chats] = field(default_factory=dict)
    curated: dict[str, Curated] = field(default_factory=dict)
    removed: dict[tuple[str, str, str], Removed] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)  # shards that fastokens could not encode, and why
    mixes: dict[str, list[Share]] = field(default_factory=dict)  # by phase
    indexed: set[str] = field(default_factory=set)  # phases whose samples were counted, not planned
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # by kind

    def remove(
        self,
        source: str,
        step: str,
        reason: str,
        documents: int,
        tokens: int | None = None,
        examples: Iterable[dict[str, Any]] = (),
    ) -> None:
        """Count documents that were removed; reasons that took nothing are left out."""
        if not documents:
            return
        reason = reason.replace("_", " ")
        entry = self.removed.setdefault((source, step, reason), Removed(source, step, reason))
        entry.documents += documents
        if tokens is not None:
            entry.tokens = (entry.tokens or 0) + tokens
        room = MAX_EXAMPLES - len(entry.examples)
        entry.examples += [_example(example) for example in list(examples)[:room]]


def _example(example: dict[str, Any]) -> str:
    """Where a removed row is and what it says, in one line."""
    place = f"{example.get('file', '?')}:{example.get('row', '?')}"
    said = " ".join(str(example.get(key) or "") for key in ("detail", "text"))
    said = " ".join(said.split())
    cut = f"{said[:EXAMPLE_CHARACTERS]}…" if len(said) > EXAMPLE_CHARACTERS else said
    return f"{place}: {cut}" if cut else place


# ---------------------------------------------------------------------------------------- collecting


def collect(paths: Sequence[Path]) -> Data:
    """Add up the records at `paths` and those of everything that they were made from."""
    last = {path: lineage.read(path) for path in paths}
    records = lineage.ancestors(entry for record in last.values() for entry in record["inputs"]) | last
    data = Data()
    for _, record in sorted(records.items()):
        data.seconds[record["kind"]].append(record.get("seconds", 0.0))
        if add := _ADD.get(record["kind"]):
            add(data, record)
    indices = {r["name"]: r for r in records.values() if r["kind"] == "index"}
    for record in records.values():
        if record["kind"] == "blend":
            _add_mix(data, record, indices.get(record["name"]))
    return data


def _add_text(data: Data, record: dict[str, Any]) -> None:
    counts, corpus = record["counts"], record["settings"]["corpus"]
    text = data.texts.setdefault(corpus, Text())
    text.shards += 1
    text.documents += counts["documents"]
    text.cut += counts.get("cut", 0)
    text.checked += counts.get("checked", 0)
    text.encoders[counts.get("encoder", "tokenizers")] += 1
    text.replaced += counts.get("replaced", 0)
    if counts.get("fallback"):
        data.fallbacks.append(f"{record['name']} was encoded by tokenizers: {counts['fallback']}")
    for split in SPLITS:
        text.kept[split] += counts[split]["documents"]
        text.tokens[split] += counts[split]["tokens"]
        text.bytes[split] += counts[split]["bytes"]
    text.lengths.update(_histogram(counts))
    _add_dropped(data, corpus, "tokenize", counts)


def _histogram(counts: dict[str, Any]) -> dict[int, int]:
    return {int(length): number for length, number in counts.get("length_histogram", {}).items()}


def _add_dropped(data: Data, source: str, step: str, counts: dict[str, Any]) -> None:
    examples = defaultdict(list)
    for example in counts.get("dropped_rows", []):
        examples[example.get("reason")].append(example)
    for reason, number in counts["dropped"].items():
        data.remove(source, step, reason, number, examples=examples[reason])


def _add_curated(data: Data, record: dict[str, Any]) -> None:
    """The record of a curated shard counts what its filters removed as well."""
    counts, corpus = record["counts"], record["name"].partition("/")[0]
    curated = data.curated.setdefault(corpus, Curated())
    curated.documents.update(before=counts["documents"], after=counts["kept"]["documents"])
    curated.tokens.update(before=counts["tokens"], after=counts["kept"]["tokens"])
    curated.changed += sum(changed["documents"] for changed in counts.get("changed", {}).values())
    for reason, removed in counts["removed"].items():
        data.remove(
            corpus, "curate", reason, removed["documents"], removed["tokens"], removed.get("examples", [])
        )
    if "dropped" in counts:
        _add_dropped(data, corpus, "read", counts)


def _add_rendered(data: Data, record: dict[str, Any]) -> None:
    source = record["settings"]["source"]
    data.chats.setdefault(source, Chats()).rows += record["counts"]["rows"]
    _add_dropped(data, source, "render", record["counts"])


def _add_packed(data: Data, record: dict[str, Any]) -> None:
    source = record["settings"]["source"]
    chats = data.chats.setdefault(source, Chats())
    chats.shards += 1
    for counts in record["counts"]["splits"].values():
        chats.conversations += counts["packed"]
        chats.packs += counts["packs"]
        chats.room += counts["packs"] * record["settings"]["pack_size"]
        chats.tokens += counts["tokens"]
        chats.trained += counts["trained_tokens"]
        chats.lengths.update(_histogram(counts))
        for reason, number in counts["dropped"].items():
            data.remove(source, "pack", reason, number)


_ADD = {
    "tokens": _add_text,
    "curated": _add_curated,
    "render_chat": _add_rendered,
    "pack_sft": _add_packed,
}


def _add_mix(data: Data, record: dict[str, Any], index: dict[str, Any] | None) -> None:
    """The mix of a phase: as the samples of its index are, or as planned where there is no index."""
    phase = record["name"]
    blend = files.read_json(Path(record["outputs"][0]["path"]))
    shares = {c["corpus"]: c["share"] for c in blend["train"]["corpora"]}
    taken = {c["corpus"]: c["taken"] for c in blend["train"]["corpora"]}
    if index:
        counted = index["counts"]["train"]
        shares = {name: number / counted["samples"] for name, number in counted["corpora"].items()}
        taken = {name: n * index["settings"]["seq_length"] for name, n in counted["corpora"].items()}
        data.indexed.add(phase)
    data.mixes[phase] = [
        Share(
            corpus=c["corpus"],
            asked=c["asked"],
            realised=shares[c["corpus"]],
            present=c["present"],
            taken=taken[c["corpus"]],
            tokens=c["tokens"],
            epochs=taken[c["corpus"]] / c["tokens"],
            repeated=c["corpus"] in record["counts"]["repeated"],
        )
        for c in blend["train"]["corpora"]
    ]


# ------------------------------------------------------------------------------------------- writing


@dataclass(frozen=True)
class Section:
    """A part of the report. In its table, names are to the left and numbers to the right."""

    title: str
    text: str
    header: list[str]
    rows: list[list[str]]
    figure: str | None = None  # its name
    details: list[str] = field(default_factory=list)


def sections(data: Data) -> list[Section]:
    """The report on `data`; what no record is about is left out."""
    parts = [
        _text_section(data),
        _curation_section(data),
        _length_section(data),
        _mix_section(data),
        _removed_section(data),
        _chat_section(data),
        _time_section(data),
    ]
    return [part for part in parts if part.rows]


def _text_section(data: Data) -> Section:
    rows = []
    for name, text in sorted(data.texts.items()):
        numbers = [text.shards, text.documents, *(text.kept[s] for s in SPLITS)]
        size, tokens = sum(text.bytes.values()) / 1e6, sum(text.tokens.values())
        per_token = f"{sum(text.bytes.values()) / tokens:.2f}" if tokens else "-"
        rows.append(
            [
                name,
                *(f"{n:,}" for n in numbers),
                f"{size:,.1f}",
                *(f"{text.tokens[s]:,}" for s in SPLITS),
                per_token,
            ]
        )
    encoders: Counter[str] = sum((t.encoders for t in data.texts.values()), Counter())
    used = ", ".join(f"{name} for {number:,} shards" for name, number in sorted(encoders.items()))
    sentences = [f"Encoded by {used}."]
    for name, sentence in (
        ("checked", "documents were compared with tokenizers."),
        ("cut", "long documents were cut."),
        ("replaced", "documents were not valid Unicode and have U+FFFD in places."),
    ):
        if number := sum(getattr(text, name) for text in data.texts.values()):
            sentences.append(f"{number:,} {sentence}")
    header = ["corpus", "shards", "rows read", "train sequences", "valid", "test", "MB"]
    header += ["train tokens", "valid", "test", "bytes a token"]
    return Section("Text", " ".join(sentences), header, rows, "tokens", data.fallbacks)


def _curation_section(data: Data) -> Section:
    rows = []
    for name, curated in sorted(data.curated.items()):
        both = (curated.documents, curated.tokens)
        numbers = [n for counts in both for n in (counts["before"], counts["after"])]
        kept = [f"{counts['after'] / counts['before']:.1%}" if counts["before"] else "-" for counts in both]
        rows.append([name, *(f"{n:,}" for n in numbers), *kept, f"{curated.changed:,}"])
    header = [
        "corpus",
        "documents before",
        "after",
        "tokens before",
        "after",
        "documents kept",
        "tokens kept",
    ]
    header += ["documents changed"]
    return Section(
        "Curation", "Before the corpora are tokenized; the reasons are under Removed.", header, rows
    )


def _length_section(data: Data) -> Section:
    rows = []
    sources: dict[str, Text | Chats] = {**data.texts, **data.chats}
    for name in sorted(sources):
        lengths = sources[name].lengths
        if number := sum(lengths.values()):
            bounds = [_quantile(lengths, share) for share in (0.5, 0.9, 0.99)]
            longest = 2 * max(lengths)
            rows.append([name, f"{number:,}", *(f"{bound:,}" for bound in (*bounds, longest))])
    header = ["source", "sequences", "half are below", "90 % below", "99 % below", "all below"]
    return Section("Lengths", "Tokens of a sequence, in powers of two.", header, rows, "lengths")


def _quantile(lengths: Counter[int], share: float) -> int:
    """The lowest power of two below which are at least `share` of the lengths."""
    rest = share * sum(lengths.values())
    for length in sorted(lengths):
        rest -= lengths[length]
        if rest <= 1e-9:
            return 2 * length
    raise AssertionError("a share above 1")


def _mix_section(data: Data) -> Section:
    rows, details = [], []
    for phase, shares in data.mixes.items():
        for s in shares:
            rows.append(
                [
                    f"{phase}: {s.corpus}",
                    *(f"{share:.2%}" for share in (s.asked, s.realised, s.present)),
                    f"{s.taken:,}",
                    f"{s.tokens:,}",
                    f"{s.epochs:.2f}" + (" !" if s.repeated else ""),
                ]
            )
            if s.repeated:
                details.append(
                    f"{phase} goes through {s.corpus} {s.epochs:.2f} times: above pretrain_data.max_epochs"
                )
    planned = [phase for phase in data.mixes if phase not in data.indexed]
    text = "Training data of each phase." + (
        f" Planned, not counted: {', '.join(planned)}." if planned else ""
    )
    header = [
        "phase: corpus",
        "asked",
        "realised",
        "of what is there",
        "tokens taken",
        "tokens there",
        "epochs",
    ]
    return Section("Mix", text, header, rows, "mix", details)


def _removed_section(data: Data) -> Section:
    ordered = sorted(data.removed.values(), key=lambda r: (r.source, -r.documents, r.step, r.reason))
    rows = [
        [
            f"{r.source}: {r.step}: {r.reason}",
            f"{r.documents:,}",
            "-" if r.tokens is None else f"{r.tokens:,}",
        ]
        for r in ordered
    ]
    details = [f"{r.source}: {r.step}: {r.reason}: {example}" for r in ordered for example in r.examples]
    total = sum(r.documents for r in ordered)
    text = f"{total:,} rows, documents and conversations were left out."
    return Section("Removed", text, ["source: step: reason", "rows", "tokens"], rows, "removed", details)


def _chat_section(data: Data) -> Section:
    rows = []
    for name, chats in sorted(data.chats.items()):
        numbers = [chats.shards, chats.rows, chats.conversations, chats.packs, chats.tokens, chats.trained]
        shares = [chats.trained_share, chats.efficiency]
        rows.append([name, *(f"{n:,}" for n in numbers), *(f"{share:.1%}" for share in shares)])
    header = [
        "chat source",
        "packed shards",
        "rows read",
        "conversations",
        "packs",
        "tokens",
        "trained tokens",
    ]
    header += ["trained", "packing efficiency"]
    return Section("Conversations", "All splits together.", header, rows, "packing")


def _time_section(data: Data) -> Section:
    rows = []
    for kind in sorted(data.seconds, key=lambda k: (list(STEPS).index(k) if k in STEPS else len(STEPS), k)):
        seconds = data.seconds[kind]
        rows.append(
            [
                STEPS.get(kind, kind.replace("_", " ")),
                f"{len(seconds):,}",
                f"{sum(seconds):,.1f}",
                f"{max(seconds):,.1f}",
            ]
        )
    text = "From the start of a job's program to its record; jobs run side by side."
    return Section("Time", text, ["step", "jobs", "seconds of all", "longest"], rows)


def markdown(parts: Sequence[Section]) -> str:
    """The report as text."""
    blocks = ["# Data report"]
    for part in parts:
        blocks += [f"## {part.title}", part.text, table(part.header, part.rows)]
        if part.details:
            blocks.append("\n".join(f"- {_plain(detail)}" for detail in part.details))
    return "\n\n".join(blocks) + "\n"


def _plain(text: str) -> str:
    """Text of unknown origin as one piece of code, so that no character of it is markup."""
    return f"`{text.replace('`', chr(39))}`"


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.75rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { border-bottom: 2px solid #888; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
img { max-width: 100%; margin: 1rem 0; } li { font: 0.8rem/1.5 monospace; overflow-wrap: anywhere; }
"""


def html(parts: Sequence[Section], figures: dict[str, bytes]) -> str:
    """The report as one page that needs no other file; `figures` are SVG by name."""
    body = []
    for part in parts:
        body += [f"<h2>{_escape(part.title)}</h2>", f"<p>{_escape(part.text)}</p>"]
        if part.figure:
            image = base64.b64encode(figures[part.figure]).decode()
            body.append(f'<img alt="{_escape(part.title)}" src="data:image/svg+xml;base64,{image}">')
        lines = [_row("th", part.header), *(_row("td", row) for row in part.rows)]
        body.append('<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>")
        if part.details:
            items = "\n".join(f"<li>{_escape(detail)}</li>" for detail in part.details)
            body.append(
                f"<details><summary>{len(part.details)} details</summary><ul>\n{items}\n</ul></details>"
            )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>Data report</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n<h1>Data report</h1>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{_escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _escape(text: str) -> str:
    return escapes.escape(text)


# --------------------------------------------------------------------------------------------- files


def write(paths: Sequence[Path], directory: Path) -> Data:
    """Write report.md, report.html, the figures and record.json, about the records at `paths`."""
    from snaketron.report import figures

    data = collect(paths)
    parts = sections(data)
    drawn = {name: draw(data) for name, draw in figures.FIGURES.items()}
    contents = {directory / f"{name}.svg": svg for name, svg in drawn.items()}
    contents[directory / "report.md"] = markdown(parts).encode()
    contents[directory / "report.html"] = html(parts, drawn).encode()
    with files.writing(*contents, directory / "record.json") as temporary:
        for path, content in zip(temporary, contents.values(), strict=False):
            path.write_bytes(content)
        record = lineage.record(
            "report",
            "data",
            inputs=paths,
            outputs=dict(zip(contents, temporary, strict=False)),
            settings={},
            counts={"records": sum(map(len, data.seconds.values()))},
        )
        temporary[-1].write_bytes(files.to_json(record))
    return data
