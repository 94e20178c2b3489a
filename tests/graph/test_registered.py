"""Tokens, packs and a checkpoint of another directory stand in for what the graph would make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plan
from snaketron import files
from snaketron.lineage.record import read
from tests.conftest import REPOSITORY, Workspace, copy_of, make_workspace

import pytest
import yaml

BLENDS = ("data/pretrain/focused/blend.json", "data/sft/blend.json")


def elsewhere(there: Path) -> dict[str, Any]:
    """The configuration of the main job, in which everything but the second phase and SFT lies elsewhere."""
    micro = yaml.safe_load((REPOSITORY / "tests/config/micro.yaml").read_text())
    broad, focused = micro["pretrain"]["phases"]
    sources = {
        (key, made): [
            {
                "name": source["name"],
                made: {
                    split: [f"{there}/data/{pattern.format(split=split, name=source['name'])}"]
                    for split in ("train", "valid")
                },
            }
            for source in micro[key]
        ]
        for key, made, pattern in (
            ("corpora", "tokens", "tokens/{name}/{split}/*"),
            ("chats", "packs", "sft/{split}/{name}/*"),
        )
    }
    return {
        "tokenizer": {"path": f"{there}/data/tokenizer", "chat_template": None},
        "pretrain": {"phases": [broad | {"checkpoint": f"{there}/ckpt/pretrain/broad"}, focused]},
    } | {key: given for (key, _), given in sources.items()}


def test_what_was_made_elsewhere_is_registered_and_not_made_again(
    finished: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    there = copy_of(finished, tmp_path / "there").path
    work = make_workspace(tmp_path / "work")
    work.write("elsewhere.yaml", yaml.safe_dump(elsewhere(there)))
    work.overlays = (*work.overlays, "elsewhere.yaml")
    asked = work.snakemake("-n", "ckpt/sft")
    assert asked.status == 0, asked.output
    assert asked.jobs == {
        "build_tokenizer": 1,
        "install_chat_template": 1,
        "register_tokens": 4,  # of docs, two pairs for each of the splits
        "blend_pretrain": 1,
        "index_pretrain": 1,
        "register_checkpoint": 1,
        "pretrain": 1,
        "register_packs": 4,
        "blend_sft": 1,
        "sft": 1,
    }
    monkeypatch.chdir(work.path)
    assert plan.main(["--configfile", *work.overlays, "--json", str(tmp_path / "plan.json")]) == 0
    planned, before = (files.read_json(path) for path in (tmp_path / "plan.json", there / BLENDS[0]))
    assert planned["jobs"] == asked.jobs
    assert planned["corpora"]["docs"]["estimated_tokens"] == before["train"]["tokens"]
    assert planned["disk"]["packs"] == planned["disk"]["raw_conversations"] > 0  # written once more
    assert planned["disk"]["training_tokens"] == 0

    made = work.snakemake(*BLENDS, "ckpt/pretrain/broad")
    assert made.status == 0, made.output[-5000:]
    here = files.read_json(work.path / BLENDS[0])
    for split in ("train", "valid"):
        assert here[split]["prefixes"] == [f"{there}/{prefix}" for prefix in before[split]["prefixes"]]
        assert here[split]["weights"] == before[split]["weights"]
    assert here["test"]["prefixes"] == []
    here, before = (files.read_json(root / BLENDS[1])["splits"] for root in (work.path, there))
    for split in ("train", "valid"):
        assert [(s["source"], s["weight"], s["tokens"], s["trained_tokens"]) for s in here[split]] == [
            (s["source"], s["weight"], s["tokens"], s["trained_tokens"]) for s in before[split]
        ]
    record = read(work.path / "ckpt/pretrain/broad/record.json")
    assert {Path(entry.path).parent.parent for entry in record.inputs} == {there / "ckpt/pretrain/broad"}
    shown = work.run("python", "scripts/lineage.py", BLENDS[0])
    assert shown.status == 0 and "registered_tokens docs, 4 shards" in shown.output, shown.output

    pair = there / "data/tokens/docs/train/part_0.bin"
    pair.touch()
    assert work.snakemake("-n", *BLENDS, "ckpt/pretrain/broad").jobs == {}
    content = bytearray(pair.read_bytes())
    content[:2] = b"\5\0"
    pair.write_bytes(content)
    assert work.snakemake("-n", *BLENDS).jobs == {"register_tokens": 1, "blend_pretrain": 1}
    pair.write_bytes(content[:-2])
    refused = work.snakemake("-n", *BLENDS)
    assert refused.status == 1
    assert f"corpora[0].tokens.train[0]: {pair}: {len(content) - 2} bytes, where part_0.idx" in refused.output
