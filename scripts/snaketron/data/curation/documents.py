"""Documents on their way through curation: where each came from, its tokens, and why it was removed.

A filtered or curated shard is Parquet with `text`, the raw `file` and `row` (from 1) that it came from, and
the corpus's metadata fields as text.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from snaketron.data.arrow import number_array, opening, schema_with, string_array, text_of
from snaketron.data.curation.folder import Entered
from snaketron.data.drops import Drops, place
from snaketron.data.encode import Encoder, Mismatch, Unencodable
from snaketron.data.rows import read_documents
from snaketron.lineage.record import Opened
from snaketron.log import UserError, logger
from snaketron.settings.curation import FilterSettings
from snaketron.wording import counted

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document

COLUMNS = {"text": pa.large_string(), "file": pa.string(), "row": pa.int64()}
GROUP_CHARACTERS = 4_000_000  # of a row group, or one document
GROUP_DOCUMENTS = 10_000
EXAMPLE_CHARACTERS = 200
EMPTY = "empty"

Documents = Iterable[Document]
Counter = Callable[[Sequence[str]], list[int]]


def token_counter(directory: Path) -> Counter:
    """A function that counts the tokens of texts as tokenize_shard will, with the end of each document."""
    encoder = Encoder(directory)

    def count(texts: Sequence[str]) -> list[int]:
        nonlocal encoder
        try:
            _, starts = encoder.encode(texts)
        except Mismatch as error:
            logger.warning("counting tokens with `tokenizers`, slower: fastokens differs: %s", error)
            encoder = Encoder(directory, problem=str(error))
            return count(texts)
        except Unencodable as error:  # tokenize_shard will stop at the document, or drop it
            logger.warning("a document is counted as 0 tokens: %s", error)
            return [*count(texts[: error.index]), 0, *count(texts[error.index + 1 :])]
        return [int(end - start + 1) for start, end in itertools.pairwise(starts)]

    return count


# ------------------------------------------------------------------------------------------- accounting


@dataclass
class Tally:
    """Counts of documents and tokens: how many came in, were removed (by reason) or changed, are left."""

    count_tokens: Counter
    num_examples: int
    documents: int = 0
    tokens: int = 0
    kept: dict[str, int] = field(default_factory=lambda: {"documents": 0, "tokens": 0})
    removed: dict[str, dict[str, Any]] = field(default_factory=dict)
    changed: dict[str, dict[str, int]] = field(default_factory=dict)
    overlooked: dict[str, int] | None = None  # kept, although they match an evaluation in what does not count
    current: Document | None = None  # the document that a block is looking at

    def enter(self, documents: Documents) -> Iterator[Document]:
        """Count documents as they come in, and their tokens."""
        for batch in batches(documents):
            for document, tokens in zip(batch, self.count_tokens([d.text for d in batch]), strict=True):
                self.documents += 1
                self.tokens += tokens
                document.metadata["tokens"] = tokens
                self.current = document
                yield document

    def remove(self, document: Document, reason: str, detail: str = "") -> None:
        """Count a document that is removed."""
        entry = self.removed.setdefault(reason, {"documents": 0, "tokens": 0, "examples": []})
        entry["documents"] += 1
        entry["tokens"] += document.metadata["tokens"]
        if len(entry["examples"]) < self.num_examples:
            example = {
                "file": document.metadata["file"],
                "row": document.metadata["row"],
                "text": document.text[:EXAMPLE_CHARACTERS],
            }
            entry["examples"].append(example | ({"detail": detail[:EXAMPLE_CHARACTERS]} if detail else {}))

    def overlook(self, document: Document) -> None:
        """Count a document that only n-grams that do not count would remove."""
        self.overlooked = self.overlooked or {"documents": 0, "tokens": 0}
        self.overlooked["documents"] += 1
        self.overlooked["tokens"] += document.metadata["tokens"]

    def through(self, documents: Documents, name: str, block: Any) -> Iterator[Document]:
        """Run a datatrove block, which sees one document at a time, and count what it changes."""
        before = ""

        def given() -> Iterator[Document]:
            nonlocal before
            for document in documents:
                before = document.text
                yield document

        for document in block.run(given()):
            if document.text != before:
                tokens = self.count_tokens([document.text])[0]
                entry = self.changed.setdefault(name, {"documents": 0, "tokens": 0})
                entry["documents"] += 1
                entry["tokens"] += tokens - document.metadata["tokens"]
                document.metadata["tokens"] = tokens
            yield document

    def leave(self, documents: Documents) -> Iterator[Document]:
        """Count what is left; a document without text is removed."""
        for document in documents:
            if not document.text:
                self.remove(document, EMPTY)
                continue
            self.kept["documents"] += 1
            self.kept["tokens"] += document.metadata["tokens"]
            yield document

    @contextlib.contextmanager
    def locating(self) -> Iterator[None]:
        """Name the document at which a block fails."""
        try:
            yield
        except (UserError, OSError):
            raise
        except Exception:
            if self.current is not None:
                origin = self.current.metadata
                logger.error("failed at the document %s", place(Path(origin["file"]), origin["row"]))
            raise

    def counts(self) -> dict[str, Any]:
        """For the record. documents = kept + removed; tokens = kept + removed - changed."""
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "kept": self.kept,
            "removed": dict(sorted(self.removed.items(), key=lambda item: -item[1]["documents"])),
            "changed": self.changed,
            **({"ignored_matches": self.overlooked} if self.overlooked else {}),
        }


class Removed(Entered):
    """Counts the documents that a datatrove block removes; to the block it is the `exclusion_writer`."""

    def __init__(self, tally: Tally, name: str) -> None:
        self.tally = tally
        self.name = name

    def write(self, document: Document, rank: int = 0) -> None:
        reason = document.metadata.get("filter_reason")
        self.tally.remove(document, f"{self.name}: {reason}" if reason else self.name)


def batches(documents: Documents) -> Iterator[list[Document]]:
    """Documents in lists of bounded size."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= GROUP_CHARACTERS or len(batch) >= GROUP_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def describe(removed: dict[str, dict[str, Any]]) -> str:
    """Reasons and numbers in one line."""
    return counted({reason: entry["documents"] for reason, entry in removed.items()}, empty="nothing")


# ------------------------------------------------------------------------------------- reading and writing


def raw(paths: Sequence[Path], settings: FilterSettings, drops: Drops, opened: Opened) -> Iterator[Document]:
    """The documents of raw files, one file after the other, up to `max_documents`; adds to `opened`."""
    number, fields = 0, settings.metadata_fields
    for path in paths:
        opened.note(path)
        before = drops.num_rows
        for row, text, values in read_documents(
            path, settings.text_field, optional=fields, settings=settings, drops=drops
        ):
            number += 1
            metadata = {"file": str(path), "row": row, "fields": [text_of(values.get(f)) for f in fields]}
            yield Document(text=text, id=str(number), metadata=metadata)
            if number == settings.max_documents:
                return
        if drops.num_rows == before:
            raise UserError(f"{path}: holds no documents; remove it from its corpus or fill it")


def fields_of(path: Path) -> list[str]:
    """The metadata fields of a filtered or curated shard."""
    with opening(path), pq.ParquetFile(path) as file:
        return [name for name in file.schema_arrow.names if name not in COLUMNS]


def read(path: Path) -> Iterator[Document]:
    """The documents of a filtered shard; the id of each is its index."""
    index = 0
    with opening(path), pq.ParquetFile(path, buffer_size=1 << 20) as file:
        fields = [name for name in file.schema_arrow.names if name not in COLUMNS]
        for batch in file.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                metadata = {"file": row["file"], "row": row["row"], "fields": [row[f] for f in fields]}
                yield Document(text=row["text"], id=str(index), metadata=metadata)
                index += 1


def write(path: Path, documents: Documents, fields: Sequence[str], about: dict[str, Any]) -> None:
    """Write documents to a Parquet file whose footer says what it is (`about`)."""
    schema = schema_with(COLUMNS.items(), about, fields, "curated text")
    dictionaries = ["file", *fields]
    with pq.ParquetWriter(
        path, schema, compression="zstd", write_statistics=False, use_dictionary=dictionaries
    ) as writer:
        for batch in batches(documents):
            metadata = zip(*(d.metadata["fields"] for d in batch), strict=True)
            arrays = [
                string_array([d.text for d in batch], COLUMNS["text"]),
                string_array([d.metadata["file"] for d in batch]),
                number_array(np.array([d.metadata["row"] for d in batch]), COLUMNS["row"]),
                *map(string_array, metadata),
            ]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
