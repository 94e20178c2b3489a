"""The same SFT with and without W&B, through the workflow."""

from __future__ import annotations

import json
import re
from pathlib import Path

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
    config = (STEPS, "tracking=offline", "notify={command: [tee, told.json]}")
    result = copy.snakemake("ckpt/sft", config=config, environment=secret)
    assert result.status == 0, result.output[-5000:]
    assert result.jobs == {"sft": 1}
    assert re.search(r"sft: W&B: kept in (\S+); send it with `wandb sync \1`", result.output)
    assert result.output.count("W&B: ") == 1
    assert (lines(copy), weights(copy)) == expected
    check_edges(copy)
    told = json.loads((copy.path / "told.json").read_text())
    assert (told["what"], told["stage"], told["step"], told["steps"]) == ("finished", "sft", 4, 4)
    assert told["directory"] == str(copy.path) and Path(told["log"]).exists() and told["loss"] > 0
    logged = [path for path in (copy.path / "wandb").rglob("*") if path.is_file()]
    assert not [path for path in logged if b"secretvalue" in path.read_bytes()]
    assert not list(home.rglob("*wandb*"))


def check_edges(workspace: Workspace) -> None:
    runs = read_runs(workspace.path / "wandb")
    record = json.loads((workspace.path / "ckpt/sft/record.json").read_text())
    sft = runs[f"sft-{record['key']}"]
    assert sft.made.keys() == {"model-sft"}
    losses = {step: row["loss"] for step, row in sft.history.items() if "loss" in row}
    assert losses == {line["iteration"]: line["loss"] for line in lines(workspace) if "loss" in line}
    used = {made: set(run.used) for run in runs.values() for made in run.made}
    assert used.keys() == {"model-pretrain_broad", "model-pretrain_focused", "model-sft"}  # a run each
    phases = {"tokenizer", "raw-tokenizer", "raw-docs"}
    assert used["model-pretrain_broad"] >= {*phases, "raw-code", "pretraining-blend-broad"}
    assert used["model-pretrain_focused"] >= {*phases, "model-pretrain_broad", "pretraining-blend-focused"}
    assert used["model-sft"] >= {"tokenizer", "model-pretrain_focused", "raw-tools", "sft-data"}
    assert not any(run.copied for run in runs.values())
