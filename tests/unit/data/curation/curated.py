"""Documents to curate, and the steps of curation as the tests call them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from snaketron.config import MinHash
from snaketron.data.curation import exact, lists, minhash
from snaketron.data.curation.curate import curate_shard
from snaketron.data.curation.filters import filter_shard
from snaketron.settings.curation import CurateSettings, FilterSettings

import pyarrow.parquet as pq


def words(prefix: str, count: int = 60) -> str:
    """A text of `count` words that no other text has."""
    return " ".join(f"{prefix}{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(count))


def changed(text: str, at: int) -> str:
    """A text with another word at a place."""
    parts = text.split()
    parts[at] = "something"
    return " ".join(parts)


def language_model(path: Path) -> Path:
    """Write a fastText model that knows English from German by a few words each."""
    import fasttext

    english = ["the water is in the house", "the house is old", "where is the water"]
    german = ["das wasser ist in dem haus", "das haus ist alt", "wo ist das wasser"]
    lines = [f"__label__en {text}" for text in english] + [f"__label__de {text}" for text in german]
    text = path.with_suffix(".txt")
    text.write_text("\n".join(lines * 20) + "\n")
    # A thread gives a tenth of the words their first weights; other words would have what memory holds.
    model = fasttext.train_supervised(str(text), epoch=200, lr=0.5, dim=8, thread=12, verbose=0)
    model.save_model(str(path))
    return path


class Steps:
    """Curation in a directory, one function a rule. A shard is CORPUS/SHARD."""

    def __init__(self, root: Path, tokenizer: Path) -> None:
        self.root = root
        self.tokenizer = tokenizer
        self.minhash = MinHash()

    def raw(self, shard: str, texts: Sequence[str]) -> Path:
        path = self.root / f"raw/{shard}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return path

    def filter(
        self,
        shard: str,
        raw: Sequence[Path],
        *filters: dict[str, Any],
        num_examples: int = 3,
        **settings: Any,
    ) -> dict[str, Any]:
        """The counts of filter_shard."""
        values = {"text_field": "text", "metadata_fields": [], "filters": filters} | settings
        return filter_shard(
            raw,
            tokenizer=self.tokenizer,
            settings=FilterSettings.model_validate(values),
            num_examples=num_examples,
            output=self.root / f"filtered/{shard}.parquet",
            record=self.root / f"filtered/{shard}.json",
        ).counts

    def filtered(self, shard: str, texts: Sequence[str]) -> None:
        """A shard of these texts, through no filter."""
        self.filter(shard, [self.raw(shard, texts)])

    def exact(self, shards: Sequence[str], order: Sequence[str] | None = None) -> dict[str, list[int]]:
        """The exact duplicates of each shard; the signatures are made in another order."""
        for shard in order or reversed(shards):
            exact.exact_signature(
                self.root / f"filtered/{shard}.parquet",
                output=self.root / f"exact/{shard}.sig",
                record=self.root / f"exact/{shard}.json",
            )
        exact.exact_find(
            [self.root / f"exact/{shard}.sig" for shard in shards],
            output=self.root / "exact.parquet",
            record=self.root / "exact.json",
        )
        return read_lists(self.root / "exact.parquet")

    def near(self, shards: Sequence[str], removals: Sequence[Path] = (), reverse: bool = False) -> Any:
        """The near-duplicates of each shard."""
        order, buckets = list(shards), list(range(self.minhash.num_buckets))
        if reverse:
            order.reverse()
            buckets.reverse()
        for shard in order:
            minhash.minhash_signature(
                self.root / f"filtered/{shard}.parquet",
                settings=self.minhash,
                output=self.root / f"minhash/{shard}.sig",
                record=self.root / f"minhash/{shard}.json",
            )
        signatures = [self.root / f"minhash/{shard}.sig" for shard in shards]
        for bucket in buckets:
            minhash.minhash_buckets(
                signatures,
                removals=removals,
                bucket=bucket,
                settings=self.minhash,
                output=self.root / f"pairs/group/{bucket}.dups",
                record=self.root / f"pairs/group/{bucket}.json",
            )
        minhash.minhash_cluster(
            [self.root / f"pairs/group/{bucket}.dups" for bucket in range(self.minhash.num_buckets)],
            signatures=signatures,
            settings=self.minhash,
            output=self.root / "near.parquet",
            record=self.root / "near.json",
        )
        return read_lists(self.root / "near.parquet")

    def curate(self, shard: str, *, n: int | None = None, pii: bool = False, num_examples: int = 3) -> Any:
        """The counts of curate_shard, with the duplicates and the index that were made before."""
        found = {name: self.root / f"{name}.parquet" for name in ("exact", "near", "index")}
        existing = {name: path if path.exists() else None for name, path in found.items()}
        return curate_shard(
            self.root / f"filtered/{shard}.parquet",
            exact=existing["exact"],
            near=existing["near"],
            index=existing["index"] if n else None,
            tokenizer=self.tokenizer,
            settings=CurateSettings(decontamination_n_grams=n, pii=pii),
            num_examples=num_examples,
            output=self.root / f"curated/{shard}.parquet",
            record=self.root / f"curated/{shard}.json",
        ).counts

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of filtered/CORPUS/SHARD or curated/CORPUS/SHARD."""
        return pq.read_table(self.root / f"{name}.parquet").to_pylist()

    def texts(self, name: str) -> list[str]:
        return [row["text"] for row in self.rows(name)]


def read_lists(path: Path) -> dict[str, list[int]]:
    found = lists.Lists(path)
    return {name: found[name].tolist() for name in found.names}
