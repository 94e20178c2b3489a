"""Documents with the same text: a hash of each, then which ones are repeated, with datatrove's blocks.

The first of several equal documents stays, in the order of the group's corpora, their shards and rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snaketron.data import curation
from snaketron.data.curation import documents, lists
from snaketron.data.curation.folder import Folder, Records, chunk_records, parts, shard_name
from snaketron.lineage.record import Record, making
from snaketron.lineage.walk import known
from snaketron.log import UserError

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.io import DataFolder
from datatrove.pipeline.dedup.exact_dedup import (
    ExactDedupConfig,
    ExactDedupSignature,
    ExactFindDedups,
    get_sig_dtype,
)

MAX_SHARDS = 65_535  # datatrove's priority of a document has 16 bits


def _text(document: Document) -> str:
    return document.text


CONFIG = ExactDedupConfig(content_getter=_text)
DTYPE = get_sig_dtype(CONFIG.hash_config)


class Signature(ExactDedupSignature):
    """datatrove's block with 14 bytes of memory for a document, where it has a tuple of three integers."""

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        hashes = (self.get_hashes(document, index)[0] for index, document in enumerate(data))
        self.save_hashes(rank, np.fromiter(hashes, DTYPE))


def exact_signature(filtered: Path, *, output: Path, record: Path) -> Record:
    """Write the hash and the index of each document of a filtered shard, sorted by hash."""
    curation.quiet()
    with (
        making("exact_signature", shard_name(output), outputs={"hashes": output}, record=record) as job,
        parts(output) as directory,
    ):
        Signature(DataFolder(str(directory)), CONFIG).run(documents.read(filtered))
        (directory / "0000/00000.c4_sig").replace(job.aside["hashes"])
        job.inputs = {"filtered": known(filtered)}
        job.counts = {"documents": job.aside["hashes"].stat().st_size // DTYPE.itemsize}
    return job.record


def exact_find(signatures: Sequence[Path], *, output: Path, record: Path) -> Record:
    """Write, for each shard, the indices of documents whose text came before; `signatures` are in order."""
    curation.quiet()
    if len(signatures) > MAX_SHARDS:
        raise UserError(
            f"exact_dedup {output.stem}: {len(signatures)} shards, and at most {MAX_SHARDS} can be compared; "
            "put more files into a shard (pretrain_data.shard_size)"
        )
    outputs = {"duplicates": output}
    with making("exact_duplicates", output.stem, outputs=outputs, record=record) as job:
        counts = {shard_name(path): path.stat().st_size // DTYPE.itemsize for path in signatures}
        inputs = {
            f"0000/{rank:05d}.c4_sig": Records(path, DTYPE, 0, count, _first(rank))
            for rank, (path, count) in enumerate(zip(signatures, counts.values(), strict=True))
        }
        found = Folder()
        lines = chunk_records(DTYPE, len(signatures))
        ExactFindDedups(Folder(inputs), found, CONFIG, lines_to_buffer=lines).run()
        repeated = {
            name: np.sort(np.frombuffer(found.written[f"00000/{rank:05d}.c4_dup"], dtype="<u4"))
            for rank, name in enumerate(counts)
        }
        job.counts = write_duplicates(
            job.aside["duplicates"], "exact_duplicates", repeated, sum(counts.values())
        )
        job.inputs = {"signatures": map(known, signatures)}
    return job.record


def _first(rank: int) -> Any:
    """Set the priority of a shard's documents: datatrove keeps the highest, and breaks ties by row only."""

    def change(chunk: np.ndarray) -> np.ndarray:
        chunk["priority"] = MAX_SHARDS - rank
        return chunk

    return change


def write_duplicates(
    path: Path, kind: str, repeated: dict[str, np.ndarray], num_documents: int | None = None
) -> dict[str, Any]:
    """Write the indices of documents to remove, by shard; returns the counts for the record."""
    by_corpus: Counter[str] = Counter()
    for name, values in repeated.items():
        by_corpus[name.partition("/")[0]] += len(values)
    lists.write(path, repeated, np.uint32, {"kind": kind})
    return {
        "shards": len(repeated),
        **({} if num_documents is None else {"documents": num_documents}),
        "removed": {"documents": sum(by_corpus.values())},
        "removed_by_corpus": dict(by_corpus),
    }
