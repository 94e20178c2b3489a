"""The parts of the data report: a table each, with a sentence before it and details after it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from snaketron.config.data import SPLITS
from snaketron.report.collect import ChatSource, Data, Text
from snaketron.report.workflow import RULES, rules_of
from snaketron.wording import plural


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
        _pack_size_section(data),
        _time_section(data),
    ]
    return [part for part in parts if part.rows]


def _text_section(data: Data) -> Section:
    rows = []
    for name, text in sorted(data.texts.items()):
        size, tokens = text.megabytes, sum(text.tokens.values())
        per_token = f"{1e6 * size / tokens:.2f}" if size and tokens else "-"
        rows.append(
            [
                name,
                f"{text.shards:,}",
                f"{data.rows_read(name):,}" if text.read_here else "-",
                *(f"{text.kept[s]:,}" for s in SPLITS),
                f"{size:,.1f}" if text.read_here else "-",
                *(f"{text.tokens[s]:,}" for s in SPLITS),
                per_token,
            ]
        )
    encoders: Counter[str] = sum((t.encoders for t in data.texts.values()), Counter())
    used = ", ".join(f"{name} for {plural(number, 'shard')}" for name, number in sorted(encoders.items()))
    sentences = [f"Encoded by {used}." if used else "All of it was tokenized elsewhere."]
    texts = data.texts.values()
    replaced = sum(text.replaced for text in texts) + sum(c.replaced for c in data.curated.values())
    for number, sentence in (
        (sum(text.checked for text in texts), "documents were compared with tokenizers."),
        (sum(text.cut for text in texts), "long documents were cut."),
        (replaced, "documents were not valid Unicode and have U+FFFD in places."),
    ):
        if number:
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
    sources: dict[str, Text | ChatSource] = {**data.texts, **data.chats}
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
                    f"{s.epochs:,.2f}" + (" !" if s.repeated else ""),
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
        read = f"{chats.rows:,}" if chats.rows else "-"  # packs from elsewhere do not say
        numbers = [chats.conversations, chats.packs, chats.tokens, chats.trained]
        shares = [f"{share:.1%}" for share in (chats.trained_share, chats.efficiency)]
        rows.append([name, f"{chats.shards:,}", read, *(f"{n:,}" for n in numbers), *shares])
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


def _pack_size_section(data: Data) -> Section:
    """The share of the conversations that packs of other sizes would hold, to choose a size by."""
    found = {name: chats for name, chats in sorted(data.chats.items()) if chats.needed}
    largest = max((max(chats.needed) for chats in found.values()), default=1)
    # From the size that holds half of some source to the one that holds all of every source.
    sizes = [
        1 << k for k in range(largest.bit_length()) if any(c.kept(1 << k) >= 0.5 for c in found.values())
    ]
    rows, details = [], []
    for name, chats in found.items():
        rows.append([name, *(f"{chats.kept(size):.1%}" for size in sizes)])
        if chats.left_out:
            total, used = chats.needed.total(), ", ".join(f"{size:,}" for size in sorted(chats.pack_sizes))
            details.append(
                f"{name}: packs of {used} tokens leave out {chats.left_out:,} of {total:,} conversations "
                f"({chats.left_out / total:.1%})"
            )
    text = (
        "Share of all conversations that packs of so many tokens (sft_data.pack_size) hold whole, "
        "those that were left out or cut included."
    )
    return Section("Pack sizes", text, ["chat source", *map(str, sizes)], rows, details=details)


def _time_section(data: Data) -> Section:
    order = [kind for _, _, kind in RULES.values()]
    rows = []
    for kind in sorted(data.seconds, key=lambda k: (order.index(k) if k in order else len(order), k)):
        seconds = data.seconds[kind]
        made_by = ", ".join(rules_of(kind)) or kind.replace("_", " ")
        rows.append([made_by, f"{len(seconds):,}", f"{sum(seconds):,.1f}", f"{max(seconds):,.1f}"])
    text = "From the start of a job's program to its record; jobs run side by side."
    return Section("Time", text, ["rule", "jobs", "seconds of all", "longest"], rows)
