"""What the jobs on raw text are told: which rows they read, and what becomes of them."""

from __future__ import annotations

from typing import Literal

from snaketron.config import Config, Corpus, Section

from pydantic import Field


class ReadSettings(Section):
    """Which rows of raw files are read, and what becomes of bad ones; see `config.PretrainData`."""

    where: dict[str, list[str | int | bool]] = Field(default_factory=dict)
    max_documents: int | None = None
    bad_rows: Literal["fail", "drop"] = "fail"
    invalid_text: Literal["fail", "replace", "drop"] = "fail"
    max_line_bytes: int = 50_000_000
    max_dropped_fraction: float = 0.01


class TokenizeSettings(ReadSettings):
    """Everything that, with the raw files and the tokenizer, defines a tokenized shard."""

    corpus: str
    text_field: str
    metadata_fields: list[str] = Field(default_factory=list)
    max_tokens: int | None = None
    valid_fraction: float
    test_fraction: float
    document_order: Literal["kept", "shuffled"] = "kept"
    seed: int | None = None  # None unless the order is shuffled
    max_document_tokens: int | None = None
    long_documents: Literal["cut", "drop"] = "cut"


def read_settings(config: Config, corpus: Corpus) -> ReadSettings:
    """How the raw rows of a corpus are read."""
    data = config.pretrain_data
    return ReadSettings(
        where=corpus.where,
        max_documents=corpus.max_documents,
        bad_rows=data.bad_rows,
        invalid_text=data.invalid_text,
        max_line_bytes=data.max_line_bytes,
        max_dropped_fraction=data.max_dropped_fraction,
    )


def tokenize_settings(config: Config, corpus: Corpus) -> TokenizeSettings:
    """What defines the tokens of a corpus. Curation has already applied `where` and the limit."""
    data = config.pretrain_data
    read = read_settings(config, corpus)
    if corpus.curation:
        read = read.model_copy(update={"where": {}, "max_documents": None})
    return TokenizeSettings(
        **read.model_dump(),
        corpus=corpus.name,
        text_field="text" if corpus.curation else corpus.text_field,
        metadata_fields=corpus.metadata_fields,
        max_tokens=corpus.max_tokens,
        valid_fraction=data.valid_fraction,
        test_fraction=data.test_fraction,
        document_order=data.document_order,
        seed=config.seed if data.document_order == "shuffled" else None,
        max_document_tokens=data.max_document_tokens,
        long_documents=data.long_documents,
    )
