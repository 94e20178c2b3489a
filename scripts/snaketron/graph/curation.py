"""What the rules of curation ask while Snakemake builds the graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from snaketron.config import Config, Curation
from snaketron.graph.unknown import find
from snaketron.settings.curation import curate_settings, filter_settings

type Kind = Literal["exact_dedup", "minhash_dedup"]  # keys of a corpus, which name a group of corpora


class CurationGraph:
    """Answers about corpora that are curated, by corpus and shard or by group of corpora.

    Args:
        text: of each corpus the shards, as `Graph.text`.
    """

    def __init__(self, config: Config, text: Mapping[str, Iterable[str]]) -> None:
        self.config, self.text = config, text
        self.corpora = {corpus.name: corpus for corpus in config.corpora}

    # Input functions get the wildcards of the job.

    def shards(self, kind: Kind, pattern: str) -> Callable[[Any], list[str]]:
        """The files of all shards of a group, in the order that decides which document stays.

        They are `pattern` with {corpus} and {shard} filled in.
        """
        return lambda wildcards: [
            pattern.format(corpus=corpus, shard=shard)
            for corpus in self._group(kind, wildcards.group)
            for shard in self.text[corpus]
        ]

    def exact_duplicates_of_group(self, wildcards: Any) -> list[str]:
        """What exact de-duplication removes from the corpora of a MinHash group."""
        curations = [self.corpora[c].curation for c in self._group("minhash_dedup", wildcards.group)]
        groups = {c.exact_dedup for c in curations if c and c.exact_dedup}
        return [f"<data>/curation/exact_duplicates/{group}.parquet" for group in sorted(groups)]

    def exact_duplicates(self, wildcards: Any) -> list[str]:
        group = self._curation(wildcards).exact_dedup
        return [f"<data>/curation/exact_duplicates/{group}.parquet"] if group else []

    def near_duplicates(self, wildcards: Any) -> list[str]:
        group = self._curation(wildcards).minhash_dedup
        return [f"<data>/curation/near_duplicates/{group}.parquet"] if group else []

    def decontamination_index(self, wildcards: Any) -> list[str]:
        wanted = self._curation(wildcards).decontaminate
        return ["<data>/curation/evaluation/index.parquet"] if wanted else []

    # Params: a change runs the job again.

    def filter_settings(self, wildcards: Any) -> str:
        return filter_settings(self.config, self.corpora[wildcards.corpus]).model_dump_json()

    def curate_settings(self, wildcards: Any) -> str:
        return curate_settings(self.config, self.corpora[wildcards.corpus]).model_dump_json()

    def minhash_settings(self) -> str:
        return self.config.curation.minhash.model_dump_json()

    def corpora_of(self, kind: Kind) -> Callable[[Any], list[str]]:
        """The corpora of a group; their order decides which document stays."""
        return lambda wildcards: self._group(kind, wildcards.group)

    def _group(self, kind: Kind, name: str) -> list[str]:
        """The corpora that name a group, in the order of the configuration."""
        groups: dict[str, list[str]] = {}
        for corpus in self.config.corpora:
            if corpus.curation and (group := getattr(corpus.curation, kind)):
                groups.setdefault(group, []).append(corpus.name)
        return find(f"group of {kind}", name, groups)

    def _curation(self, wildcards: Any) -> Curation:
        return find("corpus", wildcards.corpus, self.corpora).curation or Curation()
