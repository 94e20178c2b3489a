"""Why a row of a raw file is in no shard, as far as the records and lists say."""

from __future__ import annotations

from snaketron.data.curation import lists
from snaketron.data.trace.rows import written
from snaketron.lineage.catalogue import Catalogue, Made
from snaketron.lineage.record import Record
from snaketron.wording import counted

DUPLICATES = {"exact": "exact duplicate", "near": "near duplicate"}
OF_ANOTHER = "of an earlier document, which may be trained on"


def why_dropped(catalogue: Catalogue, shard: Made, file: str, row: int) -> str:
    """Why a shard does not have a row, which may be that it has no such row."""
    told = _listed(shard.record, file, row)
    if told:
        return f"dropped: {told}"
    for entry in shard.record.inputs_named("text"):
        maker = catalogue.made_by(entry, shard)
        if maker and maker.record.kind == "curated":
            return _in_curation(catalogue, maker, file, row)
    return _unlisted(shard.record, "dropped")


def _in_curation(catalogue: Catalogue, curated: Made, file: str, row: int) -> str:
    """Why curation removed a row, or that it did not."""
    (entry,) = curated.record.inputs_named("filtered")
    filtered = catalogue.made_by(entry, curated)
    path = filtered.place(filtered.record.outputs[0]) if filtered else curated.place(entry)
    found = written(path, file, [row])
    if not found:
        if filtered is None:
            return "filtered out, or not in the file"
        if told := _listed(filtered.record, file, row):
            return f"dropped: {told}"
        told = _example(filtered.record, file, row)
        return f"filtered out: {told}" if told else _unlisted(filtered.record, "dropped or filtered out")
    number = found[0][0]
    for name, reason in DUPLICATES.items():
        for entry in curated.record.inputs_named(name):
            if number in lists.Lists(curated.place(entry))[curated.record.name]:
                return f"removed by curation: {reason} {OF_ANOTHER}"
    if told := _example(curated.record, file, row):
        return f"removed by curation: {told}"
    return _unlisted(curated.record, "removed by curation, or dropped after it")


def _listed(record: Record, file: str, row: int) -> str:
    """The reason that a record gives for a row; it lists the first ones of each reason."""
    for entry in record.counts.get("dropped_rows", ()):
        if (entry["file"], entry["row"]) == (file, row):
            return ": ".join(part for part in (entry["reason"], entry["detail"]) if part)
    return ""


def _example(record: Record, file: str, row: int) -> str:
    """The reason of a row that is among a record's examples of what was removed."""
    for reason, entry in record.counts.get("removed", {}).items():
        if any((one["file"], one["row"]) == (file, row) for one in entry["examples"]):
            return str(reason)
    return ""


def _unlisted(record: Record, what: str) -> str:
    """What can be said of a row that no list names: for which reasons there were drops."""
    counts = record.counts
    reasons = dict(counts.get("dropped", {}))
    reasons |= {reason: entry["documents"] for reason, entry in counts.get("removed", {}).items()}
    limits = [name for name in ("max_documents", "max_tokens") if record.settings.get(name)]
    said = [f"the record of {record.name} lists only the first of its {counted(reasons, sign=' ')}"]
    if not reasons:
        said = []
    if limits:
        said.append(f"{' and '.join(limits)} ends the shard before it")
    return f"{what}, or not in the file: {'; or '.join(said)}" if said else "not in the file"
