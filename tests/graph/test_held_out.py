"""A validation set of the user's is a source of its own, of text and of conversations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plan
from snaketron import files
from tests.conftest import REPOSITORY, Workspace

import pyarrow.parquet as pq
import pytest
import yaml

BLENDS = ("data/pretrain/broad/blend.json", "data/sft/blend.json")


def held_out(split: str | None = "valid", weight: float = 1.0, tokens: int = 12288) -> str:
    """The main job with a held-out source beside those of its first phase and of SFT, 0.5 and 0.5."""
    micro = yaml.safe_load((REPOSITORY / "tests/config/micro.yaml").read_text())
    corpora, chats, phases = micro["corpora"], micro["chats"], micro["pretrain"]["phases"]
    corpora.append({"name": "notes", "paths": ["my/notes.jsonl"], "split": split})
    chats.append({"name": "asked", "paths": ["my/chats.jsonl"], "split": split})
    phases[0] = phases[0] | {"tokens": tokens}
    phases[0]["blend"].append({"corpus": "notes", "weight": weight})
    names = {"questions": 0.5, "tools": 0.5, "asked": weight}
    sft = {"blend": [{"source": name, "weight": of} for name, of in names.items()]}
    value = {"corpora": corpora, "chats": chats, "pretrain": {"phases": phases}, "sft": sft}
    return yaml.safe_dump(value)


def shares(value: list[dict[str, Any]], name: str, share: str) -> dict[str, float]:
    return {one[name]: one[share] for one in value}


def test_a_source_of_one_split_is_held_out_as_a_whole(
    copy: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Weights 0.5, 0.5 and 1 are 0.5 and 0.5 of the training, and 0.25, 0.25 and 0.5 of the validation."""
    notes = [json.dumps({"text": f"note {i} of mine"}) for i in range(20)]
    copy.write("my/notes.jsonl", "\n".join(notes) + "\n")
    questions = (copy.path / "data/sample/questions/part_1.jsonl").read_text().splitlines()
    copy.write("my/chats.jsonl", "\n".join(questions[:10]) + "\n")
    copy.write("mine.yaml", held_out())
    copy.overlays = (*copy.overlays, "mine.yaml")
    asked = copy.snakemake("-n", *BLENDS)
    assert asked.jobs == {
        **{"tokenize_shard": 1, "blend_pretrain": 1},
        **{"render_chat": 1, "pack_sft": 1, "blend_sft": 1},
    }, asked.output
    made = copy.snakemake(*BLENDS)
    assert made.status == 0, made.output[-5000:]
    text, chats = (files.read_json(copy.path / path) for path in BLENDS)
    found = {split: shares(text[split]["corpora"], "corpus", "share") for split in ("train", "valid", "test")}
    assert found["train"] == {"docs": 0.5, "code": 0.5}
    assert found["valid"] == {"docs": 0.25, "code": 0.25, "notes": 0.5}
    assert "notes" not in found["test"]
    counts = files.read_json(copy.path / "data/tokens/notes/notes.json")["counts"]
    assert {split: counts[split]["documents"] for split in found} == {"train": 0, "valid": 20, "test": 0}
    found = {split: shares(sources, "source", "weight") for split, sources in chats["splits"].items()}
    assert found["train"] == {"questions": 0.5, "tools": 0.5}
    assert found["valid"] == {"questions": 0.25, "tools": 0.25, "asked": 0.5}
    assert "asked" not in found["test"]
    rendered = pq.read_table(copy.path / "data/chat/asked/chats.parquet", columns=["split"])
    assert rendered.column("split").to_pylist() == ["valid"] * 10

    monkeypatch.chdir(copy.path)
    assert plan.main(["--configfile", *copy.overlays, "--json", str(tmp_path / "plan.json")]) == 0
    planned = files.read_json(tmp_path / "plan.json")["trainings"][0]["corpora"]
    assert {name: of["share"] for name, of in planned.items()} == {"docs": 0.5, "code": 0.5}

    made = copy.snakemake("ckpt/pretrain/broad")
    assert made.status == 0, made.output[-5000:]
    counts = files.read_json(copy.path / "ckpt/pretrain/broad/record.json")["counts"]
    assert (counts["sources"].keys(), counts["held_out"].keys()) == ({"docs", "code"}, {"notes"})
    # More tokens are known ahead to go on from what is there.
    copy.write("mine.yaml", held_out(tokens=24576))
    longer = copy.snakemake("-n", "ckpt/pretrain/broad").output
    assert "pretrain/broad     continues at step 12 of 24, from pretrain_broad-" in longer, longer
    # Another split makes the tokens and the conversations of these sources again, and no others.
    copy.write("mine.yaml", held_out("test"))
    other = copy.snakemake("-n", *BLENDS)
    assert other.jobs == asked.jobs
    assert "corpora[2].split: valid -> test" in other.output
    assert "chats[2].split: valid -> test" in other.output
