"""Files of the user that were replaced or touched, on finished shards: content decides and not times."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tests.conftest import Workspace, make_workspace

import pytest
import yaml

LONG_AGO = 1_000_000_000  # seconds since 1970
PACKS = "data/sft/help/small.json"
MESSAGES = [{"role": "user", "content": "two?"}, {"role": "assistant", "content": "Two."}]
TARGETS = ("data/tokens/docs/large.json", "data/chat/help/small.json")
CONFIG = {
    "tokenizer": {"text": ["raw/large.jsonl"], "vocab_size": 300, "chat_template": "raw/template.jinja"},
    "corpora": [{"name": "docs", "paths": ["raw/large.jsonl"]}],
    "pretrain_data": {"valid_fraction": 0.1, "test_fraction": 0.1},
    "pretrain": {"phases": [{"name": "one", "tokens": 999, "blend": [{"corpus": "docs", "weight": 1}]}]}
    | {"seq_length": 64, "global_batch_size": 4, "warmup_tokens": 128, "decay_tokens": 128},
    "chats": [{"name": "help", "paths": ["raw/small.jsonl"]}],
    "sft": {"blend": [{"source": "help", "weight": 1}]},
}


def replace(path: Path, text: str) -> None:
    """As `cp -p` and `rsync -a` do it: with an older time."""
    other = path.with_name("other")
    other.write_text(text)
    os.utime(other, (LONG_AGO, LONG_AGO))
    other.rename(path)


def packed(tmp_path: Path, config: dict[str, Any]) -> tuple[Workspace, Path]:
    """A workspace in which one file of conversations was packed, and that file."""
    workspace = make_workspace(tmp_path / "work")
    workspace.overlays = (workspace.write("mine.yaml", yaml.safe_dump(config)).name,)
    workspace.write("raw/large.jsonl", json.dumps({"text": "some words " * 400}))
    workspace.write("raw/template.jinja", (workspace.path / "config/chat_template.jinja").read_text())
    small = workspace.write("raw/small.jsonl", json.dumps({"messages": MESSAGES}) + "\n")
    assert workspace.snakemake(PACKS).status == 0
    return workspace, small


def jobs(workspace: Workspace) -> dict[str, int]:
    result = workspace.snakemake("-n", *TARGETS)
    assert result.status == 0, result.output
    return result.jobs


def test_content_decides_what_runs_again(tmp_path: Path):
    workspace = make_workspace(tmp_path / "work")
    workspace.overlays = (workspace.write("mine.yaml", yaml.safe_dump(CONFIG)).name,)
    texts = [json.dumps({"text": f"document {i} " + "of many words " * 400}) for i in range(200)]
    large = workspace.write("raw/large.jsonl", "\n".join(texts))
    assert large.stat().st_size > 1_000_000  # up to there Snakemake knows by itself that a file is the same
    small = workspace.write("raw/small.jsonl", json.dumps({"messages": MESSAGES}) + "\n")
    template = (workspace.path / "config/chat_template.jinja").read_text()
    raw_template = workspace.write("raw/template.jinja", template)
    result = workspace.snakemake(*TARGETS)
    assert result.status == 0, result.output[-5000:]

    for path in (large, small, raw_template):
        path.touch()
    assert jobs(workspace) == {}
    replace(large, "\n".join(reversed(texts)))
    assert jobs(workspace) == {"tokenize_shard": 1}
    replace(raw_template, template + "\n")
    assert jobs(workspace) == {"tokenize_shard": 1, "install_chat_template": 1, "render_chat": 1}
    result = workspace.snakemake(*TARGETS)
    assert result.status == 0, result.output[-5000:]
    assert jobs(workspace) == {}
    assert jobs(workspace) == {}
    replace(small, json.dumps({"messages": MESSAGES * 2}) + "\n")
    assert jobs(workspace) == {"render_chat": 1}


@pytest.mark.parametrize("template", [None, "raw/template.jinja"])
def test_a_job_for_an_older_file_that_failed_is_still_to_run(tmp_path: Path, template: str | None):
    """It has deleted its outputs. The packs of the old file are there, and newer than all that is left.

    A template of its own, which has not changed, is another file that the job reads.
    """
    chats = [{"name": "help", "paths": ["raw/small.jsonl"], "chat_template": template}]
    workspace, small = packed(tmp_path, CONFIG | {"chats": chats})
    replace(small, json.dumps({"message": MESSAGES}) + "\n")
    failed = workspace.snakemake(PACKS)
    assert failed.status == 1 and "raw/small.jsonl:1: no field 'messages'" in failed.output
    assert workspace.snakemake("-n", PACKS).jobs == {"render_chat": 1, "pack_sft": 1}
    replace(small, json.dumps({"messages": MESSAGES * 2}) + "\n")
    assert workspace.snakemake(PACKS).jobs == {"render_chat": 1, "pack_sft": 1}
    assert workspace.snakemake("-n", PACKS).jobs == {}
    (workspace.path / "data/chat/help/small.json").unlink()  # what was made of it is finished
    assert workspace.snakemake("-n", PACKS).jobs == {}


def test_a_file_is_replaced_after_what_was_made_of_it_was_deleted(tmp_path: Path):
    """For its space: the packs are there. Nothing is started between the run and that."""
    workspace, small = packed(tmp_path, CONFIG)
    before = small.read_text()
    for file in (workspace.path / "data/chat/help").iterdir():
        file.unlink()
    replace(small, json.dumps({"messages": MESSAGES * 2}) + "\n")
    assert workspace.snakemake("-n", PACKS).jobs == {"render_chat": 1, "pack_sft": 1}
    replace(small, before)
    assert workspace.snakemake("-n", PACKS).jobs == {}
