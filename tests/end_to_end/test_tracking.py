"""The same SFT with and without W&B, through the workflow."""

from __future__ import annotations

import itertools
import json

from snaketron.files import sha256
from tests.conftest import Workspace
from tests.wandb_log import read_runs

STEPS = "sft={train_iters: 4}"


def lines(workspace: Workspace) -> list[dict]:
    """The metrics of SFT, without times."""
    text = (workspace.path / "ckpt/sft/metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k != "timing"} for line in text.splitlines()]


def weights(workspace: Workspace) -> dict[str, str]:
    files = (workspace.path / "ckpt/sft").glob("iter_0000004/*.distcp")
    return {path.name: sha256(path) for path in files}


def test_tracking_logs_the_run_and_changes_nothing(copy: Workspace):
    assert copy.snakemake("ckpt/sft", config=(STEPS,)).status == 0
    assert not (copy.path / "wandb").exists()
    expected = lines(copy), weights(copy)
    for path in (copy.path / "ckpt/versions").glob("sft-*"):
        path.rename(path.with_name(f"{path.name}-untracked"))  # so that it is trained again
    (copy.path / "ckpt/sft").unlink()

    home = copy.path / "home"
    home.mkdir()
    secret = {"WANDB_API_KEY": "secretvalue", "HOME": str(home)}
    result = copy.snakemake("ckpt/sft", config=(STEPS, "tracking=offline"), environment=secret)
    assert result.status == 0, result.output[-5000:]
    assert result.jobs == {"sft": 1}
    assert "W&B" not in result.output
    assert (lines(copy), weights(copy)) == expected
    check_edges(copy)
    logged = [path for path in (copy.path / "wandb").rglob("*") if path.is_file()]
    assert not [path for path in logged if b"secretvalue" in path.read_bytes()]
    assert not list(home.rglob("*wandb*"))


def check_edges(workspace: Workspace) -> None:
    runs = read_runs(workspace.path / "wandb")
    record = json.loads((workspace.path / "ckpt/sft/record.json").read_text())
    sft = runs[f"sft-{record['key']}"]
    assert sft.used.keys() == {"blend_sft-sft", "tokenizer", "checkpoint-pretrain_focused"}
    assert sft.made.keys() == {"checkpoint-sft"}
    losses = {step: row["loss"] for step, row in sft.history.items() if "loss" in row}
    assert losses == {line["iteration"]: line["loss"] for line in lines(workspace) if "loss" in line}
    used = {made: set(run.used) for run in runs.values() for made in run.made}
    for path in (
        ["sample-docs", "tokens-docs", "blend-focused", "checkpoint-pretrain_focused", "checkpoint-sft"],
        ["sample-code", "tokens-code", "blend-broad", "checkpoint-pretrain_broad"],
        ["checkpoint-pretrain_broad", "checkpoint-pretrain_focused"],
        ["sample-tools", "render_chat-tools", "pack_sft-tools", "blend_sft-sft", "checkpoint-sft"],
    ):
        for before, after in itertools.pairwise(path):
            assert before in used[after], (before, after)
    assert sft.files["checkpoint-sft"] == ["config.yaml", "metrics.jsonl", "record.json"]
