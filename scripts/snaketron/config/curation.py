"""Curation: what is removed from corpora before they are tokenized."""

from __future__ import annotations

from typing import Any, Literal

from snaketron.config.base import Count, Name, Positive, Section, Text, key

from pydantic import Field

# Options that each filter takes; they are the arguments of datatrove's class of that name.
FILTERS: dict[str, tuple[str, ...]] = {
    "gopher_quality": (
        "min_doc_words",
        "max_doc_words",
        "min_avg_word_length",
        "max_avg_word_length",
        "max_symbol_word_ratio",
        "max_bullet_lines_ratio",
        "max_ellipsis_lines_ratio",
        "max_non_alpha_words_ratio",
        "min_stop_words",
        "stop_words",
        "language",
    ),
    "gopher_repetition": (
        "dup_line_frac",
        "dup_para_frac",
        "dup_line_char_frac",
        "dup_para_char_frac",
        "top_n_grams",
        "dup_n_grams",
        "language",
    ),
    "c4_quality": (
        "split_paragraph",
        "remove_citations",
        "filter_no_terminal_punct",
        "min_num_sentences",
        "min_words_per_line",
        "max_word_length",
        "filter_lorem_ipsum",
        "filter_javascript",
        "filter_curly_bracket",
        "filter_policy",
        "language",
    ),
    "fineweb_quality": (
        "line_punct_thr",
        "line_punct_exclude_zero",
        "stop_chars",
        "short_line_thr",
        "short_line_length",
        "char_duplicates_ratio",
        "new_line_ratio",
        "language",
    ),
    "language": ("model", "languages", "language_threshold"),
    "regex": ("pattern",),
}


class Filter(Section):
    """One of datatrove's filters."""

    name: Literal[
        "gopher_quality", "gopher_repetition", "c4_quality", "fineweb_quality", "language", "regex"
    ] = Field(
        description="which filter; `c4_quality` removes lines, too; `regex` removes documents with a "
        "match of `pattern`"
    )
    options: dict[str, Any] = key(
        dict,
        "arguments of datatrove's filter, those not given as it has them; `language` needs `model`, the path "
        "of a fastText model, and `languages`",
    )


class Curation(Section):
    """What is removed from a corpus before it is tokenized, in this order."""

    filters: list[Filter] = key(list, "filters of single documents, in order")
    exact_dedup: Name | None = key(
        None,
        "name of a group of corpora: of documents with the same text, the first stays, in the order of "
        "the corpora; null: no exact de-duplication",
    )
    minhash_dedup: Name | None = key(
        None, "name of a group of corpora: of documents with nearly the same text, one stays"
    )
    decontaminate: bool = key(False, "remove documents that share an n-gram with `curation.evaluation`")
    pii: bool = key(False, "replace e-mail and public IP addresses; docs/data.md says which ones")


class MinHash(Section):
    """Near-duplicates: two documents are compared by hashes of their n-grams (datatrove's MinHash)."""

    n_grams: Positive = key(5, "words of an n-gram")
    num_buckets: Positive = key(14, "buckets; documents that agree in all hashes of one are duplicates")
    hashes_per_bucket: Positive = key(
        8, "hashes of a bucket; 14 x 8 finds a similarity of 0.75 in 77 % and one of 0.8 in 92 % of the cases"
    )


class CurationData(Section):
    """What the curation of all corpora shares. A corpus is curated only where it says so."""

    minhash: MinHash = key(MinHash, "how near-duplicates are found")
    evaluation: list[Text] = key(
        list, "files with the texts of evaluations, for `decontaminate`: the same formats as a corpus"
    )
    evaluation_field: Text = key("text", "column or JSON key of those files that holds the text")
    decontamination_n_grams: Positive = key(
        12,
        "words of an n-gram that must not be shared; n-grams of numbers or of few different words do not "
        "count",
    )
    num_examples: Count = key(3, "examples of removed documents to keep for each reason and file")
