"""The last step: a filtered shard without duplicates and contaminated documents, and with PII replaced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from snaketron.data import curation
from snaketron.data.curation import decontamination, documents, lists
from snaketron.data.curation.folder import shard_name
from snaketron.data.curation.personal import Pii
from snaketron.lineage.record import Record, making
from snaketron.lineage.walk import known, record_about
from snaketron.log import UserError, logger
from snaketron.settings.curation import CurateSettings
from snaketron.wording import plural

import numpy as np
from datatrove.data import Document

EXACT = "exact duplicate"
NEAR = "near duplicate"
PII = "pii"


def curate_shard(
    filtered: Path,
    *,
    exact: Path | None,
    near: Path | None,
    index: Path | None,
    tokenizer: Path,
    settings: CurateSettings,
    num_examples: int,
    output: Path,
    record: Path,
) -> Record:
    """Write what is left of a filtered shard to `output`, and `record` last; returns the record.

    `exact` and `near` list the duplicates in the shard's groups; `index` has the n-grams of the evaluations.
    The record counts all steps of curation, from the raw files on. The tokenizer is for counting tokens.
    """
    curation.quiet()
    name = shard_name(output)
    before = record_about(filtered).counts
    tally = documents.Tally(documents.token_counter(tokenizer), num_examples)
    fields = documents.fields_of(filtered)
    outputs = {"documents": output}
    with making("curated", name, outputs=outputs, record=record) as job, tally.locating():
        duplicates = {
            reason: lists.Lists(path)[name] for reason, path in ((EXACT, exact), (NEAR, near)) if path
        }
        stream = curated(documents.read(filtered), duplicates, index, settings, tally)
        documents.write(job.aside["documents"], stream, fields, {"kind": "curated", "name": name})
        if tally.documents != before["kept"]["documents"]:
            raise UserError(f"{filtered}: not the file that its record is about; delete both and run again")
        counts = whole(before, tally.counts())
        _warn(name, counts, tally)
        made_from = {"filtered": filtered, "exact": exact, "near": near, "index": index}
        job.inputs = {what: known(path) for what, path in made_from.items() if path}
        job.settings, job.counts = settings.model_dump(), counts
    return job.record


def _warn(name: str, counts: dict[str, Any], tally: documents.Tally) -> None:
    """Say when nothing is left of a shard, and what stays although it matches an evaluation."""
    if not tally.kept["documents"]:
        logger.warning(
            "%s: NOTHING IS LEFT of %d documents: %s",
            *(name, counts["documents"], documents.describe(counts["removed"])),
        )
    if found := tally.overlooked:
        logger.warning(
            "%s: %s with %d tokens share only numbers and few different words with an evaluation; they stay",
            *(name, plural(found["documents"], "document"), found["tokens"]),
        )


def curated(
    stream: Iterable[Document],
    duplicates: dict[str, np.ndarray],
    index: Path | None,
    settings: CurateSettings,
    tally: documents.Tally,
) -> Iterator[Document]:
    """The documents that no step removes, as the steps leave them; `tally` counts what each step does."""
    stream = without(tally.enter(stream), duplicates, tally)
    if settings.decontamination_n_grams is not None:
        assert index is not None
        removed = decontamination.Contaminated(tally, decontamination.REASON)
        block = decontamination.decontamination_filter(index, settings.decontamination_n_grams, removed)
        stream = tally.through(stream, decontamination.REASON, block)
    if settings.pii:
        stream = tally.through(stream, PII, Pii())
    return tally.leave(stream)


def without(
    stream: Iterable[Document], duplicates: dict[str, np.ndarray], tally: documents.Tally
) -> Iterator[Document]:
    """Remove the documents whose indices `duplicates` lists by reason."""
    reasons = {int(index): reason for reason, listed in duplicates.items() for index in listed}
    for index, document in enumerate(stream):
        reason = reasons.pop(index, None)
        if reason is None:
            yield document
        else:
            tally.remove(document, reason)
    if reasons:
        raise UserError(
            f"document {next(iter(reasons))} is listed as a duplicate and is not there; delete the lists and "
            "run again"
        )


def whole(before: dict[str, Any], counts: dict[str, Any]) -> dict[str, Any]:
    """The counts of filtering (`before`) and of the later steps (`counts`), as one."""
    return counts | {
        "documents": before["documents"],
        "tokens": before["tokens"],
        "removed": before["removed"] | counts["removed"],
        "changed": before["changed"] | counts["changed"],
        **{key: before[key] for key in ("rows", "dropped", "dropped_rows")},
        "replaced": before.get("replaced", 0),  # which records of before do not count
    }
