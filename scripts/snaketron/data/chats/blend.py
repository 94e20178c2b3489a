"""The blend of packed sources that SFT trains on: weights and files, checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snaketron.config.data import SPLITS
from snaketron.data.arrow import check_expected
from snaketron.data.chats.left_out import LeftOut
from snaketron.data.chats.unusable import ADVICE
from snaketron.data.drops import tell_of_shards
from snaketron.files import check_size, read_json, to_json
from snaketron.lineage.record import Record, making, read
from snaketron.lineage.walk import record_of
from snaketron.log import UserError, logger
from snaketron.settings.blends import BlendSettings
from snaketron.settings.registering import PACKS

SAME = ("tokenizer_sha256", "pack_size", "algorithm", "padding_multiple")
COUNTS = ("packs", "tokens", "trained_tokens")
_AGAIN = "remove its record and run again, so that it is packed again"


def build(settings: BlendSettings, records: Sequence[Path], output: Path, record: Path) -> Record:
    """Weigh the packed shards of `records`; write blend.json and then `record`, and return it."""
    for path, times in Counter(records).items():
        if times > 1:
            raise UserError(f"--records {path}: is given twice; its packs would count twice")
    with making("blend_sft", "sft", outputs={"blend.json": output}, record=record) as job:
        packed = {path: read(path) for path in records}
        value = weigh(settings, packed)
        for source in settings.weights:
            _tell_left_out(source, [made for made in packed.values() if made.settings["source"] == source])
        job.aside["blend.json"].write_bytes(to_json(value))
        job.inputs, job.settings = {"records": records}, settings.model_dump()
        job.counts = {
            split: {name: sum(source[name] for source in sources) for name in COUNTS}
            for split, sources in value["splits"].items()
        }
    return job.record


def weigh(blend: BlendSettings, records: Mapping[Path, Record]) -> dict[str, Any]:
    """Check the records of packed shards against each other and the disk, and weigh their sources.

    The weights of a split sum to 1. Within a source, every pack counts the same, whichever shard it is in.
    """
    settings = _same_settings(records)
    shards: dict[str, list[tuple[Path, Record]]] = {source: [] for source in blend.weights}
    for path, record in records.items():
        source = record.settings["source"]
        if source not in shards:
            raise UserError(f"{path}: source {source!r} has no weight in the blend")
        shards[source].append((path, record))
        first = shards[source][0]
        template, other = (r.settings["template_sha256"] for r in (record, first[1]))
        if template != other:
            raise UserError(
                f"{path}: made with template_sha256 {template}, but {first[0]} of its source with {other}; "
                "run the workflow again so that both are made alike"
            )
    splits = {split: _split(split, blend, shards) for split in SPLITS}
    used = [source for sources in splits.values() for source in sources]
    tokens, packs = (sum(source[name] for source in used) for name in ("tokens", "packs"))
    return {
        **settings,
        "efficiency": round(tokens / (packs * settings["pack_size"]), 4),
        "splits": splits,
    }


def _tell_left_out(source: str, packed: Sequence[Record]) -> None:
    """A line each of the rows of a source that were not rendered, and of conversations that no pack takes."""
    made_here = [record for record in packed if record.kind != PACKS]
    rendered = {entry: record_of(entry) for record in made_here for entry in record.inputs_named("chats")}
    counts = {found[0]: found[1].counts for found in rendered.values() if found}
    tell_of_shards(f"source {source}", counts, "rows", ADVICE)
    left_out = LeftOut()
    for record in made_here:
        left_out.add(record.counts["splits"].values(), record.counts["needed_pack_size"])
    if made_here and (said := left_out.told(f"source {source}", made_here[0].settings["pack_size"])):
        logger.warning("%s", said)


def _same_settings(records: Mapping[Path, Record]) -> dict[str, Any]:
    first: tuple[Path, dict[str, Any]] | None = None
    for path, record in sorted(records.items(), key=lambda item: item[1].kind == PACKS):
        if record.kind not in ("pack_sft", PACKS):
            raise UserError(f"{path}: a record of {record.kind}, not of pack_sft")
        settings = {name: record.settings[name] for name in SAME}
        if record.kind == PACKS and first:  # how they were packed elsewhere is not asked of them
            settings["algorithm"] = first[1]["algorithm"]
        first = first or (path, settings)
        for name in SAME:
            if settings[name] != first[1][name]:
                raise UserError(
                    f"{path}: made with {name} {settings[name]}, but {first[0]} with {first[1][name]}; "
                    "run the workflow again so that both are made alike"
                )
    assert first is not None
    return first[1]


def _split(
    split: str, blend: BlendSettings, shards: Mapping[str, list[tuple[Path, Record]]]
) -> list[dict[str, Any]]:
    sources = []
    for source, weight in blend.weights.items():
        listed = [_file(path, record, split) for path, record in shards[source]]
        used = [file for file in listed if file["packs"]]
        whole = blend.splits.get(source)
        if used and whole not in (None, split):
            raise UserError(f"{used[0]['path']}: source {source!r} is of split {whole}; {_AGAIN}")
        if not used and split == (whole or "train"):
            raise UserError(
                f"source {source!r} has no packs {'to train on' if split == 'train' else f'of {split}'} in "
                f"{len(listed)} shards; see 'dropped' in their records, raise sft_data.pack_size, or take "
                "the source out of sft.blend"
            )
        if not used:
            if not whole:
                logger.warning("%s: source %r has no packs and is left out", split, source)
            continue
        if empty := len(listed) - len(used):
            message = "source %s: %d of its %d shards have no packs in %s: left out there"
            logger.info(message, source, empty, len(listed), split)
        totals = {name: sum(file[name] for file in used) for name in COUNTS}
        template = shards[source][0][1].settings["template_sha256"]
        sources.append(
            {"source": source, "weight": weight, "template_sha256": template, **totals, "files": used}
        )
    total = sum(source["weight"] for source in sources)
    return [{**source, "weight": source["weight"] / total} for source in sources]


def _file(record_path: Path, record: Record, split: str) -> dict[str, Any]:
    output = record.output(split)
    check_size(output.file, output.bytes, str(record_path), _AGAIN)
    counts = record.counts["splits"][split]
    return {
        "path": output.path,
        **{name: counts[name] for name in COUNTS},
        "bytes": output.bytes,
        "sha256": output.sha256,
    }


# ------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Source:
    """One source of a split: its share of the samples, and the files that hold its packs."""

    source: str
    weight: float
    template_sha256: str
    files: list[Path]


@dataclass(frozen=True)
class SftBlend:
    """`blend.json` as a trainer needs it; a split without packs has no sources."""

    padding_multiple: int  # the packs have room for conversations padded to it
    splits: dict[str, list[Source]]


def check_packed_blend(path: Path, **expected: Any) -> SftBlend:
    """Read a blend; `UserError` when it was made for something else, or lists a file that is not there.

    `expected` is any of `tokenizer_sha256`, `pack_size`, `algorithm`.
    """
    try:
        value = read_json(path)
        listed = {split: value["splits"][split] for split in SPLITS}
        multiple = int(value["padding_multiple"])
    except FileNotFoundError:
        raise UserError(f"{path}: no such blend; the rule blend_sft makes it") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a blend of packed chats ({error}); delete it and run again") from None
    check_expected(path, value, expected)
    for file in (file for sources in listed.values() for source in sources for file in source["files"]):
        check_size(Path(file["path"]), file["bytes"], str(path), _AGAIN)
    splits = {
        split: [
            Source(
                s["source"], s["weight"], s["template_sha256"], [Path(file["path"]) for file in s["files"]]
            )
            for s in sources
        ]
        for split, sources in listed.items()
    }
    return SftBlend(multiple, splits)
