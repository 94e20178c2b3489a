"""Sources that lie elsewhere, a lock file of them, and a configuration that has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from snaketron.config import Config, Corpus, Hub
from snaketron.sources.lockfile import Lock, read_lock

WEB = Corpus(name="web", paths=["s3://bucket/*.parquet", "s3://bucket/more"])
HUB = Corpus(name="math", hub=Hub(repository="lab/math", configuration="4plus"))


def entry(request: dict, *files: tuple[str, int]) -> dict:
    return {
        "request": request,
        "revision": None,
        "files": [
            {"name": name, "address": f"s3://bucket/{name}", "size": size, "sha256": "0" * 64}
            for name, size in files
        ],
    }


def write_lock(**sources: dict) -> Lock:
    Path("sources.lock.json").write_text(json.dumps({"version": 1, "sources": sources}), encoding="utf-8")
    return read_lock("sources.lock.json", ["mine.yaml"])


def listed(*files: tuple[str, int]) -> Lock:
    return write_lock(web=entry({"paths": WEB.paths}, *files))


def config(**changes: Any) -> Config:
    corpora = [Corpus(name="docs", paths=["raw"]), WEB, HUB]
    blend = [{"corpus": "docs", "weight": 1}]
    pretrain = {"phases": [{"name": "one", "tokens": 100_000, "blend": blend}]}
    return Config(**{"corpora": corpora, "pretrain": pretrain} | changes)
