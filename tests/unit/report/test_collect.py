"""What the records say is added up by source, by phase and by reason."""

from __future__ import annotations

from pathlib import Path

from snaketron import files
from snaketron.log import UserError
from snaketron.report.collect import ChatSource, collect
from tests.unit.report.conftest import shard

import pytest


def test_shards_of_a_corpus_are_added_up(records):
    docs = collect(records).texts["docs"]
    assert (docs.shards, docs.documents, docs.cut, docs.checked, docs.replaced) == (2, 200, 3, 20, 5)
    assert docs.tokens == {"train": 4000, "valid": 100, "test": 0}
    assert docs.kept == {"train": 400, "valid": 10, "test": 0}
    assert docs.bytes["train"] == 16000
    assert docs.encoders == {"fastokens": 1, "tokenizers": 1}
    assert docs.lengths == {4: 90, 8: 9, 1024: 1}


def test_a_shard_that_two_phases_share_counts_once(records):
    data = collect(records)
    assert data.texts["code"].shards == 1 and data.seconds["tokens"] == [1.0, 1.0, 2.5]
    assert len(data.seconds["blend"]) == 2


def test_what_was_removed_is_counted_by_source_step_and_reason(records):
    removed = {key: (r.documents, r.tokens, len(r.examples)) for key, r in collect(records).removed.items()}
    assert removed == {
        ("docs", "curate", "gopher_quality: too_short"): (8, 120, 3),
        ("docs", "curate", "exact duplicate"): (2, 60, 0),
        ("docs", "read", "bad row"): (3, None, 1),
        ("docs", "tokenize", "empty"): (2, None, 0),
        ("tools", "render", "unknown role"): (4, None, 0),
        ("tools", "pack", "longer than a pack"): (1, None, 0),
    }


def test_the_mix_is_that_of_the_index_where_there_is_one(records):
    """The index of broad took 3 and 7 of 10 samples of 800 tokens; focused is planned at 2,000 and 6,000."""
    data = collect(records)
    assert data.indexed == {"broad"}
    shares = {
        phase: [(s.corpus, s.asked, s.realised, s.taken) for s in data.mixes[phase]] for phase in data.mixes
    }
    assert shares == {
        "broad": [("docs", 0.25, 0.3, 2400), ("code", 0.75, 0.7, 5600)],
        "focused": [("docs", 0.25, 0.25, 2000), ("code", 0.75, 0.75, 6000)],
    }
    assert [(s.epochs, s.repeated) for s in data.mixes["broad"]] == [(0.6, False), (5.6, True)]


def test_packing_is_what_fills_the_packs(records):
    """320 tokens in 5 packs of 100, 96 of them trained."""
    tools = collect(records).chats["tools"]
    assert (tools.rows, tools.conversations, tools.packs, tools.room) == (30, 25, 5, 500)
    assert (tools.efficiency, tools.trained_share) == (0.64, 0.3)
    assert ChatSource().efficiency == ChatSource().trained_share == 0.0


def test_what_a_model_of_another_directory_was_trained_on_is_no_data_of_here(make, tmp_path: Path):
    """The tokenizer is that of the model."""
    make("other/docs/a.json", "tokens", settings={"corpus": "docs"}, counts=shard(1, 1, 1))
    used = {"name": "tokens", "path": "docs/a.json", "sha256": files.sha256(tmp_path / "other/docs/a.json")}
    files.write_text(tokenizer := tmp_path / "other/hf/tokenizer.json", "{}")
    about = {
        "name": "tokenizer.json",
        "path": "hf/tokenizer.json",
        "sha256": files.sha256(tokenizer),
        "bytes": 2,
    }
    make("other/hf/record.json", "export", used, outputs=[about], counts={})
    given = {"name": "origin", "path": str(tokenizer), "sha256": about["sha256"]}
    make("here/tokenizer/record.json", "tokenizer", given, counts={})
    assert collect([tmp_path / "here/tokenizer/record.json"]).texts == {}


def test_a_record_that_is_missing_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"record.json: no such record"):
        collect([tmp_path / "record.json"])
