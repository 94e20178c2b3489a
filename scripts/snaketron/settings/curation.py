"""What defines the result of the curation of a shard. Nothing heavy is imported: the graph makes these."""

from __future__ import annotations

from snaketron.config import Config, Corpus, Curation, Filter, Section
from snaketron.settings import taken
from snaketron.settings.text import ReadSettings


class FilterSettings(ReadSettings):
    """Everything that, with the raw files, defines a filtered shard."""

    text_field: str
    metadata_fields: list[str]
    filters: list[Filter]


class CurateSettings(Section):
    """Everything that, with the filtered shard, the duplicates and the index, defines a curated shard."""

    decontamination_n_grams: int | None
    pii: bool


def filter_settings(config: Config, corpus: Corpus) -> FilterSettings:
    return taken(FilterSettings, corpus, corpus.curation or Curation(), config.pretrain_data)


def curate_settings(config: Config, corpus: Corpus) -> CurateSettings:
    curation = corpus.curation or Curation()
    return CurateSettings(
        decontamination_n_grams=config.curation.decontamination_n_grams if curation.decontaminate else None,
        pii=curation.pii,
    )
