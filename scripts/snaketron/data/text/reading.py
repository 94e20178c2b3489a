"""The documents of a shard of raw or curated files, in batches for the encoder."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from snaketron.config.data import SPLITS
from snaketron.data.arrow import text_of
from snaketron.data.drops import Drops
from snaketron.data.rows import read_documents
from snaketron.data.split import split_of
from snaketron.lineage.record import FOOTER, Opened
from snaketron.log import UserError
from snaketron.settings.text import TokenizeSettings

# A batch ends with so many documents or characters: it keeps the encoder's threads busy, in some 50 MB.
BATCH_DOCUMENTS = 10_000
BATCH_CHARACTERS = 2_000_000

EMPTY = "empty"


class Document(NamedTuple):
    """One text, and where it comes from."""

    text: str
    file: str
    row: int
    split: int  # index in SPLITS
    metadata: Sequence[str | None]


@dataclass
class Reader:
    """The documents of a shard in the order of its files."""

    texts: Sequence[Path]
    settings: TokenizeSettings
    drops: Drops = field(default_factory=Drops)
    read: Opened = field(default_factory=Opened)
    found: set[str] = field(default_factory=set)  # the metadata fields that a row had
    curated: bool = False
    room: int | None = None  # documents that may still be written; None: any number

    def documents(self) -> Iterator[Document]:
        settings, fields = self.settings, self.settings.metadata_fields
        for path in self.texts:
            self.read.note(path)
            origin = ("file", "row") if _is_curated(path) else ()
            self.curated |= bool(origin)
            before = self.drops.num_rows
            rows = read_documents(
                path,
                settings.text_field,
                optional=[*fields, *origin],
                settings=settings,
                drops=self.drops,
            )
            for number, text, row in rows:
                if not text:
                    self.drops.add(path, number, EMPTY)
                    continue
                of_text = settings.split or split_of(text, settings.valid_fraction, settings.test_fraction)
                split = SPLITS.index(of_text)
                metadata: Sequence[str | None] = ()
                if fields:
                    self.found.update(name for name in fields if name in row)
                    metadata = [text_of(row.get(name)) for name in fields]
                file, number = (row["file"], row["row"]) if origin else (str(path), number)
                yield Document(text, file, number, split, metadata)
            if self.drops.num_rows == before and not origin:
                raise UserError(
                    f"{path}: holds no documents; remove it from the corpus {settings.corpus!r} or fill it"
                )

    def batches(self) -> Iterator[list[Document]]:
        """Documents to encode together, never more than there is `room` for."""
        found = self.documents()
        while self.room is None or self.room:
            batch: list[Document] = []
            characters = 0
            for document in islice(found, min(BATCH_DOCUMENTS, self.room or BATCH_DOCUMENTS)):
                batch.append(document)
                characters += len(document.text)
                if characters >= BATCH_CHARACTERS:
                    break
            if not batch:
                return
            yield batch


def _is_curated(path: Path) -> bool:
    """Whether a file is what rule curate_shard wrote: it says so, and where its documents come from."""
    if path.suffix != ".parquet":
        return False
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError):
        return False  # the reader will say what is wrong
    return json.loads(metadata.get(FOOTER, b"{}")).get("kind") == "curated"


def ahead(batches: Iterator[list[Document]]) -> Iterator[list[Document]]:
    """The `batches`; a thread reads each while the caller works on the one before."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, batches, None)
        while (batch := waiting.result()) is not None:
            waiting = pool.submit(next, batches, None)
            yield batch
