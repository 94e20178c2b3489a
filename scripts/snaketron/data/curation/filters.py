"""From the raw files of a shard to the documents that datatrove's filters let pass."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snaketron.config import FILTERS, Filter
from snaketron.data import curation
from snaketron.data.curation import documents
from snaketron.data.curation.folder import shard_name
from snaketron.data.curation.words import learn
from snaketron.data.drops import Drops
from snaketron.lineage.record import Opened, Record, making, of_user
from snaketron.log import UserError, logger
from snaketron.settings.curation import FilterSettings

from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    LanguageFilter,
    RegexFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.typeshelper import Languages


class LocalLanguageFilter(LanguageFilter):
    """datatrove's filter with a fastText model of this machine: datatrove downloads its own."""

    def __init__(
        self,
        model: str,
        languages: list[str] | str | None = None,
        language_threshold: float = 0.65,
        exclusion_writer: Any = None,
    ) -> None:
        super().__init__(languages, language_threshold, exclusion_writer)
        from fasttext.FastText import _FastText

        try:
            self.model._model = _FastText(model)
        except ValueError as error:
            raise UserError(f"filter `language`: {model} is not a fastText model ({error})") from None


class PatternFilter(RegexFilter):
    """datatrove's filter under the name of its option in the configuration."""

    def __init__(self, pattern: str, exclusion_writer: Any = None) -> None:
        try:
            super().__init__(pattern, exclusion_writer)
        except re.error as error:
            raise UserError(f"filter `regex`: {pattern!r} is not a regular expression ({error})") from None


CLASSES: dict[str, type[BaseFilter]] = {
    "gopher_quality": GopherQualityFilter,
    "gopher_repetition": GopherRepetitionFilter,
    "c4_quality": C4QualityFilter,
    "fineweb_quality": FineWebQualityFilter,
    "language": LocalLanguageFilter,
    "regex": PatternFilter,
}


def build(entry: Filter, removed: documents.Removed) -> BaseFilter:
    """A datatrove filter from its entry in the configuration."""
    options = dict(entry.options)
    if options.get("stop_chars") is not None:
        options["stop_chars"] = tuple(options["stop_chars"])  # str.endswith takes no list
    if "language" in FILTERS[entry.name]:
        learn(options.get("language", Languages.english))
    return CLASSES[entry.name](**options, exclusion_writer=removed)


def filter_shard(
    text: Sequence[Path],
    *,
    tokenizer: Path,
    settings: FilterSettings,
    num_examples: int,
    output: Path,
    record: Path,
) -> Record:
    """Write the documents of the raw files `text` that pass all filters to `output`, and `record` last.

    The tokenizer is for counting tokens. Returns the record.
    """
    curation.quiet()
    name = shard_name(output)
    tally = documents.Tally(documents.token_counter(tokenizer), num_examples)
    drops, opened = Drops(), Opened()
    outputs = {"documents": output}
    with making("filtered", name, outputs=outputs, record=record) as job, tally.locating():
        stream = tally.enter(documents.raw(text, settings, drops, opened))
        for entry in settings.filters:
            reason = f"regex {entry.options['pattern']}" if entry.name == "regex" else entry.name
            stream = tally.through(stream, entry.name, build(entry, documents.Removed(tally, reason)))
        about = {"kind": "filtered", "name": name}
        documents.write(job.aside["documents"], tally.leave(stream), settings.metadata_fields, about)
        drops.check(settings)
        if tally.kept["documents"] and (said := drops.told(name)):
            logger.info("%s", said)
        if not tally.kept["documents"]:
            logger.warning(
                "%s: NOTHING IS LEFT of %d rows: %s", name, drops.num_rows, documents.describe(tally.removed)
            )
        job.inputs = {"text": opened.entries(), "model": map(of_user, models(settings))}
        job.settings = settings.model_dump()
        job.counts = tally.counts() | {
            "rows": drops.num_rows,
            "dropped": dict(drops.reasons),
            "dropped_rows": drops.listed,
            "replaced": drops.num_replaced,
        }
    return job.record


def models(settings: FilterSettings) -> list[Path]:
    """The model files that the filters read."""
    return [Path(entry.options["model"]) for entry in settings.filters if entry.name == "language"]
