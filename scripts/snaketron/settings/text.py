"""What the jobs on raw text are told: which rows they read, and what becomes of them."""

from __future__ import annotations

from typing import ClassVar, Literal

from snaketron.config import Config, Corpus, Section
from snaketron.config.data import Split
from snaketron.settings import of_one_split, taken, unless

from pydantic import Field


class ReadSettings(Section):
    """Which rows of raw files are read, and what becomes of bad ones; see `config.PretrainData`."""

    section: ClassVar[str] = "pretrain_data"  # of the configuration, for errors; empty: no key changes it
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
    split: Split | None = unless(None)  # of all documents


class EvaluationTextSettings(ReadSettings):
    """Every text of an evaluation is read: what is left out is not looked for in the corpora."""

    section: ClassVar[str] = ""


def tokenizer_text_settings(config: Config) -> ReadSettings:
    """What becomes of bad rows in the text that a tokenizer is trained on: the same as in a corpus."""
    return taken(ReadSettings, config.pretrain_data, max_documents=None)


def tokenize_settings(config: Config, corpus: Corpus) -> TokenizeSettings:
    """What defines the tokens of a corpus. Curation has already applied `where` and the limit."""
    data = config.pretrain_data
    seed = config.seed if data.document_order == "shuffled" else None
    own = of_one_split(corpus)
    if corpus.curation:
        own |= {"where": {}, "max_documents": None, "text_field": "text"}
    return taken(TokenizeSettings, corpus, data, corpus=corpus.name, seed=seed, **own)
