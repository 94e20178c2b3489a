"""The jobs that a configuration has are told by their logs from those that it had."""

from __future__ import annotations

from pathlib import Path

from snaketron.config import load
from snaketron.graph.asked import OF_CHATS, OF_PHASES, OF_TEXT, asked
from snaketron.report.workflow import RULES

import pytest


@pytest.mark.parametrize("across", [False, True])
def test_a_job_is_asked_for_by_its_source_its_file_and_its_phase(tmp_path: Path, monkeypatch, across):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        Path(name).write_text("{}\n", encoding="utf-8")
    config = load(
        {
            "corpora": [{"name": "notes", "paths": ["*.jsonl"]}, {"name": "away", "paths": ["gone/*.jsonl"]}],
            "pretrain": {
                "phases": [{"name": "all", "tokens": 300_000, "blend": [{"corpus": "notes", "weight": 1.0}]}]
            },
            "chats": [{"name": "tools", "paths": ["a.jsonl"]}],
            "sft": {"blend": [{"source": "tools", "weight": 1.0}]},
            "sft_data": {"pack_across_shards": across},
        }
    )
    is_asked = asked(config)
    packed = {True: "all", False: "a"}
    of_data = (
        "tokenize_shard/notes/a",
        "curate_shard/notes/b",
        "tokenize_shard/away/x",
        "render_chat/tools/a",
    )
    others = ("render_chat/tools/a", "pretrain/all", "sft", "lora", "evaluate/sft", "sample_corpus/docs")
    for log in (*of_data, *others, f"pack_sft/tools/{packed[across]}"):
        assert is_asked(f"{log}.log")
    gone = ("tokenize_shard/notes/c", "filter_shard/docs/a", "render_chat/tools/b", "pretrain/broad")
    for log in (*gone, f"pack_sft/tools/{packed[not across]}"):
        assert not is_asked(f"{log}.log")


def test_the_rules_whose_jobs_are_told_are_those_of_the_workflow():
    assert {*OF_TEXT, *OF_CHATS, *OF_PHASES} <= {*RULES}
