"""A blend: which tokenized shards a phase trains on, and with which weights. A view: it copies no tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from snaketron import files
from snaketron.config.data import SPLITS
from snaketron.data.drops import tell_of_shards
from snaketron.data.text import binidx
from snaketron.lineage.record import Entry, Record, making, read
from snaketron.lineage.walk import record_of
from snaketron.log import UserError, first_line, logger
from snaketron.settings.blends import PhaseSettings
from snaketron.settings.registering import TOKENS
from snaketron.sizes import epochs as epochs_of
from snaketron.sources.pairs import MAX_SHARDS, paths
from snaketron.wording import counted

from pydantic import TypeAdapter, ValidationError

_AGAIN = "remove its record and run again, so that it is tokenized again"


@dataclass(frozen=True)
class Shard:
    """One .bin/.idx pair of a split."""

    prefix: str
    corpus: str
    documents: int
    tokens: int
    bin_bytes: int
    bin_sha256: str
    idx_bytes: int
    idx_sha256: str


@dataclass(frozen=True)
class CorpusShare:
    """What a corpus brings to a split; `share` and `present` add up to 1 over the corpora."""

    corpus: str
    asked: float  # its weight in the phase, where the weights of what is trained add up to 1
    share: float  # of the samples: `asked`, after corpora without tokens in the split are left out
    present: float  # of the tokens that the split has
    documents: int
    tokens: int
    taken: int | None  # tokens that the phase takes of it; None outside train
    epochs: float | None  # how often the phase sees each of its tokens; None outside train
    empty_shards: int  # its shards that have no tokens in the split and are left out


@dataclass(frozen=True)
class BlendedSplit:
    """The shards of a split with their weights; none where no corpus has tokens in it."""

    prefixes: list[str]
    weights: list[float]
    documents: int
    tokens: int
    corpora: list[CorpusShare]
    shards: list[Shard]


@dataclass(frozen=True)
class PretrainBlend:
    """`blend.json`."""

    phase: str
    tokenizer: str  # sha256 of tokenizer.json
    dtype: str
    train_tokens: int  # tokens of the phase, in whole steps
    train: BlendedSplit
    valid: BlendedSplit
    test: BlendedSplit

    @property
    def blend_per_split(self) -> list[tuple[list[str], list[float]] | None]:
        """What megatron-core's GPTDatasetConfig takes; None for a split without data (it crashes on [])."""
        splits = (getattr(self, name) for name in SPLITS)
        return [(s.prefixes, s.weights) if s.prefixes else None for s in splits]


# ------------------------------------------------------------------------------------------- building


def build(
    settings: PhaseSettings,
    *,
    max_epochs: float,
    records: Sequence[Path],
    tokenizer: Path,
    output: Path,
    record: Path,
) -> PretrainBlend:
    """Weigh the shards of `records`, check that each is complete, and write blend.json and `record`.

    A warning and the record name each corpus that the phase goes through more than `max_epochs` times.
    blend.json does not, so another limit trains nothing again.
    """
    identity = _identity(tokenizer)
    outputs = {"blend.json": output}
    with making("blend", settings.phase, outputs=outputs, record=record) as job:
        blend = _weighed(settings, {path: read(path) for path in records}, tokenizer, identity.sha256)
        repeated = _repeated(blend, max_epochs)
        job.aside["blend.json"].write_bytes(files.to_json(asdict(blend)))
        job.inputs = {"records": records, "tokenizer": identity}
        job.settings = settings.model_dump() | {"tokenizer": identity.sha256, "max_epochs": max_epochs}
        splits = {name: getattr(blend, name) for name in SPLITS}
        job.counts = {name: {"documents": s.documents, "tokens": s.tokens} for name, s in splits.items()} | {
            "repeated": {c.corpus: c.epochs for c in repeated}
        }
    return blend


def _repeated(blend: PretrainBlend, max_epochs: float) -> list[CorpusShare]:
    """The corpora that the phase goes through more than `max_epochs` times, with a warning about each."""
    found = [c for c in blend.train.corpora if (c.epochs or 0) > max_epochs]
    for corpus in found:
        logger.warning(
            "phase %s goes through corpus %s %.2f times (it takes %s tokens and there are %s), more than "
            "pretrain_data.max_epochs %g: lower its weight, shorten the phase, or add text",
            blend.phase,
            corpus.corpus,
            corpus.epochs,
            f"{corpus.taken:,}",
            f"{corpus.tokens:,}",
            max_epochs,
        )
    return found


def _identity(tokenizer: Path) -> Entry:
    path = tokenizer / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; build the tokenizer first")
    return Entry("tokenizer", str(path), files.sha256(path))


def _weighed(
    settings: PhaseSettings, records: Mapping[Path, Record], tokenizer: Path, identity: str
) -> PretrainBlend:
    """Check the shards of all records, and weigh them."""
    phase, weights = settings.phase, settings.weights
    shards: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    dtypes: set[str] = set()
    for path, made in records.items():
        _check_record(phase, path, made, weights, identity, tokenizer)
    for path, made in records.items():
        for split in [made.settings["split"]] if made.kind == TOKENS else SPLITS:
            shard, pair = _shard(made, split, path)
            dtypes.add(pair.dtype)
            shards[split].append(shard)
    _check_weights(phase, weights, shards, records)
    _tell_dropped(weights, records)
    if len(dtypes) > 1:
        raise UserError(f"phase {phase!r}: shards of different types: {', '.join(sorted(dtypes))}; {_AGAIN}")
    splits = {split: weigh(split, settings, shards[split]) for split in SPLITS}
    return PretrainBlend(phase, identity, dtypes.pop(), settings.train_tokens, **splits)


def _check_record(
    phase: str,
    path: Path,
    made: Record,
    weights: Mapping[str, float],
    identity: str,
    tokenizer: Path,
) -> None:
    if made.kind not in ("tokens", TOKENS):
        raise UserError(f"{path}: a record of {made.kind}, not of a tokenized shard")
    corpus, made_with = made.settings["corpus"], made.settings["tokenizer"]
    if corpus not in weights:
        raise UserError(f"{path}: is of corpus {corpus!r}, which has no weight in phase {phase!r}")
    if made_with != identity:
        raise UserError(
            f"{path}: tokenized with another tokenizer (sha256 {made_with[:12]}, "
            f"{tokenizer} has {identity[:12]}); {_AGAIN}"
        )


def _check_weights(
    phase: str,
    weights: Mapping[str, float],
    shards: Mapping[str, Sequence[Shard]],
    records: Mapping[Path, Record],
) -> None:
    """Check that each corpus has documents, and say what one without any lost, by reason."""
    for corpus, weight in weights.items():
        count = sum(s.corpus == corpus for s in shards["train"])
        if not count:
            raise UserError(f"phase {phase!r}: no record of corpus {corpus!r} (weight {weight}) was given")
        if not any(s.documents for split in shards.values() for s in split if s.corpus == corpus):
            lost = sum((_lost(r) for r in records.values() if r.settings["corpus"] == corpus), Counter[str]())
            reasons = counted(dict(sorted(lost.items())), empty="nothing", sign=" ")
            raise UserError(
                f"phase {phase!r}: corpus {corpus!r} has no documents in any of its {count} shards "
                f"(dropped: {reasons}); look at its files and filters, or leave it out"
            )
    for split, found in shards.items():
        if (number := sum(s.tokens > 0 for s in found)) > MAX_SHARDS:
            raise UserError(
                f"phase {phase!r}: {number} shards with tokens in {split}, where megatron-core takes "
                f"{MAX_SHARDS}; set pretrain_data.shard_size to put several raw files into one"
            )


def _tell_dropped(corpora: Iterable[str], records: Mapping[Path, Record]) -> None:
    """A line for each corpus that lost rows when its shards were read, by curation or to be tokenized."""
    for corpus in corpora:
        made = {p: r for p, r in records.items() if r.kind == "tokens" and r.settings["corpus"] == corpus}
        read_by_curation = dict(found for record in made.values() for found in _filtered(record))
        tell_of_shards(f"corpus {corpus}, curation", read_by_curation, "rows")
        tell_of_shards(f"corpus {corpus}", {path: r.counts for path, r in made.items()}, "documents")


def _lost(tokens: Record) -> Counter[str]:
    """What a shard lost by reason, its curation and the rows that this did not read included."""
    lost = Counter(tokens.counts["dropped"])
    for _, curated in _curated(tokens):
        lost.update(curated.counts["dropped"])
        lost.update({why: removed["documents"] for why, removed in curated.counts["removed"].items()})
    return lost


def _curated(tokens: Record) -> Iterator[tuple[Path, Record]]:
    """The path and the record of each file that curation wrote for a shard."""
    for text in tokens.inputs_named("text"):
        found = record_of(text) if text.file.suffix == ".parquet" else None
        if found and found[1].kind == "curated":
            yield found


def _filtered(tokens: Record) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The path and the counts of each record of the filters that a shard of a curated corpus went through."""
    for _, curated in _curated(tokens):
        for entry in curated.inputs_named("filtered"):
            if found := record_of(entry):
                yield found[0], found[1].counts


def _shard(record: Record, split: str, path: Path) -> tuple[Shard, binidx.Pair]:
    """The pair of one split, after its files are checked against the record."""
    if record.kind == TOKENS:  # it lies where the user has it
        bin_file, idx_file = (record.inputs_named(name)[0] for name in ("bin", "idx"))
    else:
        bin_file, idx_file = record.output(f"{split}.bin"), record.output(f"{split}.idx")
    count = record.counts[split]
    for entry in (bin_file, idx_file):
        files.check_size(entry.file, entry.bytes, f"its record {path}", _AGAIN)
    prefix = bin_file.path.removesuffix(".bin")
    pair = binidx.check(Path(prefix), _AGAIN)
    for what, found, recorded in (
        ("sequences", pair.sequences, count["documents"]),
        ("tokens", pair.tokens, count["tokens"]),
    ):
        if found != recorded:
            raise UserError(f"{idx_file.path}: {found} {what}, its record {path} says {recorded}; {_AGAIN}")
    shard = Shard(
        prefix=prefix,
        corpus=record.settings["corpus"],
        documents=count["documents"],
        tokens=count["tokens"],
        bin_bytes=bin_file.bytes,
        bin_sha256=bin_file.sha256,
        idx_bytes=idx_file.bytes,
        idx_sha256=idx_file.sha256,
    )
    return shard, pair


def weigh(split: str, settings: PhaseSettings, shards: Sequence[Shard]) -> BlendedSplit:
    """Spread the weight of each corpus over its shards in proportion to their tokens.

    A shard without tokens is left out. A corpus without tokens is an error in train; in valid and test it is
    left out, and the other corpora keep their proportions. A corpus of one split counts in that alone.
    """
    weights = settings.of_split(split)
    trained = sum(settings.of_split("train").values())
    for shard in shards:
        if shard.documents and shard.corpus not in weights:
            raise UserError(
                f"{shard.prefix}: has {shard.documents} documents in {split}, and corpus {shard.corpus!r} is "
                f"of split {settings.splits[shard.corpus]}; {_AGAIN}"
            )
    by_corpus = {corpus: [s for s in shards if s.corpus == corpus] for corpus in weights}
    tokens = {corpus: sum(s.tokens for s in found) for corpus, found in by_corpus.items()}
    empty = {corpus: sum(not s.tokens for s in found) for corpus, found in by_corpus.items()}
    for corpus, found in by_corpus.items():
        _report_empty(corpus, split, empty[corpus], len(found))
    total = sum(weight for corpus, weight in weights.items() if tokens[corpus])
    share = {corpus: weight / total for corpus, weight in weights.items() if tokens[corpus]}

    def brought(corpus: str) -> CorpusShare:
        taken, epochs = (
            epochs_of.taken(share[corpus], tokens[corpus], settings.train_tokens)
            if split == "train"
            else (None, None)
        )
        return CorpusShare(
            corpus=corpus,
            asked=weights[corpus] / trained,
            share=share[corpus],
            present=tokens[corpus] / sum(tokens.values()),
            documents=sum(s.documents for s in by_corpus[corpus] if s.tokens),
            tokens=tokens[corpus],
            taken=taken,
            epochs=epochs,
            empty_shards=empty[corpus],
        )

    kept = [s for s in shards if s.tokens]
    return BlendedSplit(
        prefixes=[s.prefix for s in kept],
        weights=[share[s.corpus] * (s.tokens / tokens[s.corpus]) for s in kept],
        documents=sum(s.documents for s in kept),
        tokens=sum(s.tokens for s in kept),
        corpora=[brought(corpus) for corpus in share],
        shards=kept,
    )


def _report_empty(corpus: str, split: str, num_empty: int, num_shards: int) -> None:
    """Say which shards without tokens are left out; `UserError` when a corpus has nothing to train on."""
    if num_empty == num_shards and split == "train":
        raise UserError(
            f"corpus {corpus!r} has no tokens in train; give it more text or take it out of the blend"
        )
    if not num_shards:
        message = (
            "%s: corpus %s is registered without and is left out: name pairs in its tokens.%s to see its loss"
        )
        logger.warning(message, split, corpus, split)
    elif num_empty == num_shards:
        logger.warning(
            "%s: corpus %s has no tokens and is left out: raise pretrain_data.%s_fraction to see its loss",
            split,
            corpus,
            split,
        )
    elif num_empty:
        message = "corpus %s: %d of its %d shards have no tokens in %s: left out there"
        logger.info(message, corpus, num_empty, num_shards, split)


# -------------------------------------------------------------------------------------------- reading


def load_blend(path: Path) -> PretrainBlend:
    """Read a blend.json."""
    try:
        return TypeAdapter(PretrainBlend).validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run rule blend_pretrain") from None
    except ValidationError as error:
        raise UserError(f"{path}: not a blend ({first_line(error)}); delete it and run again") from None


def check_blend(path: Path) -> PretrainBlend:
    """Read a blend.json and check that each of its files is there in full size; no content is read."""
    blend = load_blend(path)
    for split in (blend.train, blend.valid, blend.test):
        for shard in split.shards:
            bin_path, idx_path = paths(Path(shard.prefix))
            files.check_size(bin_path, shard.bin_bytes, str(path), _AGAIN)
            files.check_size(idx_path, shard.idx_bytes, str(path), _AGAIN)
    return blend
