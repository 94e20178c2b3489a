"""Adds up what the lineage records say about the data of a run; no data is read again."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snaketron import files
from snaketron.config.data import SPLITS
from snaketron.lineage.record import Kind, Record, read
from snaketron.lineage.walk import ancestors

MAX_EXAMPLES = 3  # removed rows that are quoted, for each source, step and reason
EXAMPLE_CHARACTERS = 100


@dataclass
class Removal:
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
    documents: int = 0  # rows that were read to be tokenized: of a curated corpus those that curation kept
    kept: Counter[str] = field(default_factory=Counter)  # sequences by split
    tokens: Counter[str] = field(default_factory=Counter)  # by split
    bytes: Counter[str] = field(default_factory=Counter)  # by split
    cut: int = 0  # documents too long for one sequence
    replaced: int = 0  # documents in which U+FFFD replaces bytes that are no Unicode
    checked: int = 0  # documents for which both encoders gave the same ids
    encoders: Counter[str] = field(default_factory=Counter)  # shards by encoder
    lengths: Counter[int] = field(default_factory=Counter)  # sequences by the power of 2 below their tokens

    @property
    def read_here(self) -> bool:
        """Whether its text was, and not only tokens of it: then rows and bytes are not known."""
        return bool(self.encoders)

    @property
    def megabytes(self) -> float:
        return sum(self.bytes.values()) / 1e6


@dataclass
class Curated:
    """What curation made of a corpus, summed over its shards."""

    documents: Counter[str] = field(default_factory=Counter)  # before and after
    tokens: Counter[str] = field(default_factory=Counter)  # before and after
    rows: int = 0  # of the raw files
    changed: int = 0  # documents in which something was replaced
    replaced: int = 0  # documents in which U+FFFD replaces bytes that are no Unicode


@dataclass
class ChatSource:
    """A source of conversations, summed over its shards."""

    shards: int = 0
    rows: int = 0
    conversations: int = 0  # packed
    packs: int = 0
    room: int = 0  # tokens that the packs could hold
    tokens: int = 0
    trained: int = 0
    cut: int = 0  # conversations that were longer than a pack
    left_out: int = 0  # conversations that no pack took
    pack_sizes: set[int] = field(default_factory=set)  # of its shards
    # All conversations, those left out too, by the smallest power of two that holds them.
    needed: Counter[int] = field(default_factory=Counter)

    @property
    def lengths(self) -> Counter[int]:
        """All conversations by the power of two below their tokens."""
        return Counter({max(1, size // 2): number for size, number in self.needed.items()})

    def kept(self, pack_size: int) -> float:
        """Share of the conversations that packs of a power of two would hold whole."""
        return sum(n for size, n in self.needed.items() if size <= pack_size) / self.needed.total()

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
    chats: dict[str, ChatSource] = field(default_factory=dict)
    curated: dict[str, Curated] = field(default_factory=dict)
    removed: dict[tuple[str, str, str], Removal] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)  # shards that fastokens could not encode, and why
    mixes: dict[str, list[Share]] = field(default_factory=dict)  # by phase
    indexed: set[str] = field(default_factory=set)  # phases whose mix is counted from the index
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # by kind
    lacking: list[str] = field(default_factory=list)  # records of shards that a blend names, and that changed

    def rows_read(self, corpus: str) -> int:
        """The rows of the raw files of a corpus, also those that curation took out of it."""
        curated = self.curated.get(corpus)
        return self.texts[corpus].documents + (curated.rows - curated.documents["after"] if curated else 0)

    def remove(
        self,
        source: str,
        step: str,
        reason: str,
        documents: int,
        tokens: int | None = None,
        examples: Iterable[dict[str, Any]] = (),
    ) -> None:
        """Count removed documents; a reason that removed none gets no entry."""
        if not documents:
            return
        entry = self.removed.setdefault((source, step, reason), Removal(source, step, reason))
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
    """Add up the records at `paths` and those of everything that they were made from.

    What another directory trained a model on, such as one with the same tokenizer, is not data of here.
    """
    last = {path: read(path) for path in paths}
    inputs = (entry for record in last.values() for entry in record.inputs)
    records = ancestors(inputs, of_others=False) | last
    data = add_up(record for _, record in sorted(records.items()))
    named = [entry for record in records.values() for entry in record.inputs_named("records")]
    data.lacking = list(dict.fromkeys(entry.path for entry in named if entry.file not in records))
    indices = {r.name: r for r in records.values() if r.kind == "index"}
    for record in records.values():
        if record.kind == "blend":
            _add_mix(data, record, indices.get(record.name))
    return data


def add_up(records: Iterable[Record]) -> Data:
    """Sum what records say of text, curation, conversations and time, but not of the mix of a phase."""
    data = Data()
    for record in records:
        data.seconds[record.kind].append(record.seconds)
        if add := _ADD.get(record.kind):
            add(data, record)
    return data


def _add_text(data: Data, record: Record) -> None:
    counts, corpus = record.counts, record.settings["corpus"]
    text = data.texts.setdefault(corpus, Text())
    text.shards += 1
    text.documents += counts["documents"]
    text.cut += counts.get("cut", 0)
    text.checked += counts.get("checked", 0)
    text.encoders[counts.get("encoder", "tokenizers")] += 1
    text.replaced += counts.get("replaced", 0)
    if counts.get("fallback"):
        data.fallbacks.append(f"{record.name} was encoded by tokenizers: {counts['fallback']}")
    for split in SPLITS:
        part = counts[split]
        text.kept[split] += part["documents"]
        text.tokens[split] += part["tokens"]
        text.bytes[split] += part["bytes"]
    text.lengths.update(_histogram(counts))
    _add_dropped(data, corpus, "tokenize", counts)


def _add_registered(data: Data, record: Record) -> None:
    """Add tokens that were made elsewhere: nobody here knows the text."""
    text = data.texts.setdefault(record.settings["corpus"], Text())
    text.shards += 1
    for split in SPLITS:
        text.kept[split] += record.counts[split]["documents"]
        text.tokens[split] += record.counts[split]["tokens"]


def _histogram(counts: Mapping[str, Any]) -> dict[int, int]:
    return {int(length): number for length, number in counts.get("length_histogram", {}).items()}


def _add_dropped(data: Data, source: str, step: str, counts: Mapping[str, Any]) -> None:
    examples = defaultdict(list)
    for example in counts.get("dropped_rows", []):
        examples[example.get("reason")].append(example)
    for reason, number in counts["dropped"].items():
        data.remove(source, step, reason, number, examples=examples[reason])


def _add_curated(data: Data, record: Record) -> None:
    """Add a curated shard. Its record also counts what the filters before it removed."""
    counts, corpus = record.counts, record.name.partition("/")[0]
    curated = data.curated.setdefault(corpus, Curated())
    curated.documents.update(before=counts["documents"], after=counts["kept"]["documents"])
    curated.rows += counts.get("rows", counts["documents"])
    curated.replaced += counts.get("replaced", 0)
    curated.tokens.update(before=counts["tokens"], after=counts["kept"]["tokens"])
    curated.changed += sum(changed["documents"] for changed in counts.get("changed", {}).values())
    for reason, removed in counts["removed"].items():
        data.remove(
            corpus, "curate", reason, removed["documents"], removed["tokens"], removed.get("examples", [])
        )
    if "dropped" in counts:
        _add_dropped(data, corpus, "read", counts)


def _add_rendered(data: Data, record: Record) -> None:
    source = record.settings["source"]
    data.chats.setdefault(source, ChatSource()).rows += record.counts["rows"]
    _add_dropped(data, source, "render", record.counts)


def _add_packed(data: Data, record: Record) -> None:
    source = record.settings["source"]
    chats = data.chats.setdefault(source, ChatSource())
    chats.shards += 1
    chats.pack_sizes.add(record.settings["pack_size"])
    chats.needed.update({int(size): n for size, n in record.counts.get("needed_pack_size", {}).items()})
    for counts in record.counts["splits"].values():
        chats.conversations += counts["packed"]
        chats.packs += counts["packs"]
        chats.room += counts["packs"] * record.settings["pack_size"]
        chats.tokens += counts["tokens"]
        chats.trained += counts["trained_tokens"]
        chats.cut += counts["cut"]
        chats.left_out += sum(counts["dropped"].values())
        if "needed_pack_size" not in record.counts:  # packs from elsewhere: what they leave out is not known
            chats.needed.update({2 * length: n for length, n in _histogram(counts).items()})
        for reason, number in counts["dropped"].items():
            data.remove(source, "pack", reason, number)


_ADD: dict[Kind, Callable[[Data, Record], None]] = {
    "tokens": _add_text,
    "curated": _add_curated,
    "render_chat": _add_rendered,
    "pack_sft": _add_packed,
    "registered_tokens": _add_registered,
    "registered_packs": _add_packed,
}


def _add_mix(data: Data, record: Record, index: Record | None) -> None:
    """Add the mix of a phase: counted from the samples of its index, or the plan where there is no index."""
    phase = record.name
    blend = files.read_json(record.output("blend.json").file)
    corpora = blend["train"]["corpora"]
    shares = {c["corpus"]: c["share"] for c in corpora}
    taken = {c["corpus"]: c["taken"] for c in corpora}
    if index:
        counted = index.counts["train"]
        shares = {name: number / counted["samples"] for name, number in counted["corpora"].items()}
        taken = {name: n * index.settings["seq_length"] for name, n in counted["corpora"].items()}
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
            repeated=c["corpus"] in record.counts["repeated"],
        )
        for c in corpora
    ]
