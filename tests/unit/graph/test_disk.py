"""The disk that a configuration takes: what is there is counted, what is not is estimated, or not known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from snaketron.config import Config
from snaketron.files import write_json
from snaketron.graph.disk import disk, made
from tests.records import record

TRAINING = {"on_request": False, "checkpoint_bytes": 100, "checkpoints_kept": 2}


def of(corpus: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    """256 ids, of a byte each when compressed, and two as they are."""
    config = Config.model_validate({"tokenizer": {"vocab_size": 512}})
    config.tokenizer.vocab_size = 256
    return disk(
        config,
        {"docs": {"registered": False} | corpus},
        {"talk": source},
        [TRAINING, TRAINING | {"on_request": True}],
    )


def test_what_is_made_is_counted():
    found = of(
        {"raw_bytes": 1000, "train_tokens": 300, "estimated_tokens": 250.0},
        {"raw_bytes": 500, "estimated_tokens": 100.0, "rendered_bytes": 90, "packed_bytes": 80},
    )
    assert found == {
        "raw_text": 1000,
        "training_tokens": 600,
        "raw_conversations": 500,
        "rendered_conversations": 90,
        "packs": 80,
        "checkpoints": 200,
        "checkpoints_while_saving": 300,
        "estimated": [],
    }


def test_tokens_from_elsewhere_stay_where_they_are():
    """They are the raw files of their corpus, and were counted twice."""
    found = of(
        {"raw_bytes": 1000, "train_tokens": 300, "estimated_tokens": 300.0, "registered": True},
        {"raw_bytes": 500, "estimated_tokens": 0, "rendered_bytes": 0, "packed_bytes": 500},
    )
    assert (found["raw_text"], found["training_tokens"], found["packs"]) == (1000, 0, 500)


def test_what_is_not_made_is_estimated_by_the_tokens_of_the_raw_files():
    found = of(
        {"raw_bytes": 1000, "train_tokens": None, "estimated_tokens": 250.0},
        {"raw_bytes": 500, "estimated_tokens": 100.0, "rendered_bytes": 90, "packed_bytes": None},
    )
    assert (found["training_tokens"], found["rendered_conversations"], found["packs"]) == (500, 90, 100)
    assert found["estimated"] == ["training_tokens", "packs"]


def test_what_is_not_known_is_none():
    found = of(
        {"raw_bytes": None, "train_tokens": None, "estimated_tokens": None},
        {"raw_bytes": None, "estimated_tokens": None, "rendered_bytes": None, "packed_bytes": None},
    )
    assert found["raw_text"] is None and found["packs"] is None and found["estimated"] == []


def test_records_say_what_was_made(tmp_path: Path):
    for shard, size in (("a", 10), ("b", 20)):
        output = {"name": "rendered", "path": f"{shard}.parquet", "sha256": "", "bytes": size}
        write_json(tmp_path / f"{shard}.json", record("chats", outputs=[output]))
    assert made(tmp_path, ["a", "b"]) == 30
    assert made(tmp_path, ["a", "c"]) is None
