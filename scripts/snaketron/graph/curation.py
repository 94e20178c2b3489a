"""What the rules of curation ask while Snakemake builds the graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from snaketron.config import Config, Curation
from snaketron.graph.unknown import find
from snaketron.settings.curation import curate_settings, filter_settings


class CurationGraph:
    """Answers about corpora that are curated, by corpus and shard or by group of corpora.

    Args:
        text: of each corpus the shards, as `Graph.text`.
    """

    def __init__(self, config: Config, text: Mapping[str, Iterable[str]]) -> None:
        self.config, self.text = config, text
        self.corpora = {corpus.name: corpus for corpus in config.corpora}

    # Input functions get the wildcards of the job.

    def exact_signatures(self, wildcards: Any) -> list[str]:
        """The signatures of all shards of a group, in the order that decides which document stays."""
        return self._shards("exact_dedup", wildcards.group, "<data>/curation/exact_signatures/{}.sig")

    def minhash_signatures(self, wildcards: Any) -> list[str]:
        """The signatures of all shards of a group, in the order that decides which document stays."""
        return self._shards("minhash_dedup", wildcards.group, "<data>/curation/minhash_signatures/{}.sig")

    def exact_duplicates_of_group(self, wildcards: Any) -> list[str]:
        """What exact de-duplication removes from the corpora of a MinHash group."""
        curations = [self.corpora[c].curation for c in self.group("minhash_dedup", wildcards.group)]
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

    def exact_corpora(self, wildcards: Any) -> list[str]:
        """The corpora of a group; their order decides which document stays."""
        return self.group("exact_dedup", wildcards.group)

    def minhash_corpora(self, wildcards: Any) -> list[str]:
        """The corpora of a group; their order decides which document stays."""
        return self.group("minhash_dedup", wildcards.group)

    def group(self, kind: Literal["exact_dedup", "minhash_dedup"], name: str) -> list[str]:
        """The corpora that name a group, in the order of the configuration."""
        return [c.name for c in self.config.corpora if c.curation and getattr(c.curation, kind) == name]

    def _curation(self, wildcards: Any) -> Curation:
        return find("corpus", wildcards.corpus, self.corpora).curation or Curation()

    def _shards(self, kind: Literal["exact_dedup", "minhash_dedup"], group: str, pattern: str) -> list[str]:
        groups = {getattr(c.curation, kind) for c in self.config.corpora if c.curation} - {None}
        find(f"group of {kind}", group, dict.fromkeys(groups, ""))
        return [pattern.format(f"{c}/{shard}") for c in self.group(kind, group) for shard in self.text[c]]
