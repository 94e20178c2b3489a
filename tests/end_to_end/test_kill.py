"""SIGKILL to a whole run at any moment, and the same command again: the end is the undisturbed one's."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import Workspace, copy_of
from tests.end_to_end.processes import exists, kill_in, newest, run_until, saved

import pytest


def weights(checkpoint: Path) -> dict[str, str]:
    """Hashes of the files with tensors (model and optimizer) of the final checkpoint."""
    final = max(checkpoint.glob("iter_*"))
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in final.glob("*.distcp")}
    assert found
    return found


def metrics(checkpoint: Path) -> list[dict[str, Any]]:
    """The lines of metrics without what is timed."""
    lines = [json.loads(line) for line in (checkpoint / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "timing"} for line in lines]


def begin_again(copy: Workspace, target: str) -> Path:
    """Forget what was trained for `target` and after it; the undisturbed checkpoint."""
    published = copy.path / target
    undisturbed = copy.path / "undisturbed"
    shutil.copytree(published.resolve(), undisturbed)
    shutil.rmtree(published.resolve())
    published.unlink()
    return undisturbed


def half_written(root: Path, version: str = "*") -> Callable[[], bool]:
    """Inside the write of the second checkpoint: the first is complete, files of the next one appear."""
    first = saved(root, 4, version)
    return lambda: first() and exists(root, f"versions/{version}/.iter_*.partial/*")()


def first_line(root: Path) -> Callable[[], bool]:
    return lambda: any(file.stat().st_size > 0 for file in root.glob("versions/*/metrics.jsonl"))


# In the order in which a training comes to them that is killed at each and started again.
MOMENTS = {
    "at start": lambda root: exists(root, "versions/*/config.yaml"),
    "before the first checkpoint": first_line,
    "inside a checkpoint write": half_written,
    "after a checkpoint": lambda root: saved(root, 8),
    "before publishing": lambda root: saved(root, 12),
}
TARGET = "ckpt/pretrain/broad"


@dataclass
class Kills:
    """A workspace in which one kill followed the other, and what each did: status, and what was published."""

    workspace: Workspace
    undisturbed: Path
    statuses: dict[str, int] = field(default_factory=dict)
    published: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def killed(finished: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Kills:
    """A pretraining that is killed at each moment, and then left to end."""
    workspace = copy_of(finished, tmp_path_factory.mktemp("killed") / "work")
    kills, ckpt = Kills(workspace, begin_again(workspace, TARGET)), workspace.path / "ckpt"
    for version in list((ckpt / "versions").iterdir()):  # so that only the killed version is looked at
        version.rename(workspace.path / version.name)
    for moment, reached in MOMENTS.items():
        command = workspace.command(TARGET)
        kills.statuses[moment], _ = run_until(workspace, command, reached(ckpt), signal.SIGKILL)
        if (workspace.path / TARGET).exists():
            kills.published.add(moment)
    again = workspace.snakemake(TARGET)
    assert again.status == 0, again.output[-3000:]
    return kills


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_pretraining_ends_as_an_undisturbed_one(killed: Kills, moment: str):
    assert killed.statuses[moment] == -signal.SIGKILL and moment not in killed.published
    path = killed.workspace.path
    assert weights(path / TARGET) == weights(killed.undisturbed)
    assert metrics(path / TARGET) == metrics(killed.undisturbed)
    assert list((path / "ckpt/versions").glob("*/.*.partial")) == []


def test_killed_while_a_checkpoint_is_written_in_the_background(copy: Workspace):
    """The bytes are those of a run that waited for its checkpoints."""
    target, config = "ckpt/pretrain/broad", ("pretrain={save_in_background: true}",)
    undisturbed = begin_again(copy, target)
    for version in list((copy.path / "ckpt/versions").iterdir()):
        version.rename(copy.path / version.name)
    moment = half_written(copy.path / "ckpt")
    killed, _ = run_until(copy, copy.command(target, config=config), moment, signal.SIGKILL)
    assert killed == -signal.SIGKILL
    again = copy.snakemake(target, config=config)
    assert again.status == 0, again.output[-3000:]
    assert weights(copy.path / target) == weights(undisturbed)
    assert metrics(copy.path / target) == metrics(undisturbed)
    assert list((copy.path / "ckpt/versions").glob("*/.*.partial")) == []


def test_a_killed_sft_ends_as_an_undisturbed_one(copy: Workspace):
    undisturbed = begin_again(copy, "ckpt/sft")
    answers = (undisturbed / "answers/step_0000010.json").read_text()
    assert {entry["finish_reason"] for entry in json.loads(answers)} <= {"stop", "length"}
    inside = half_written(copy.path / "ckpt")
    for version in (copy.path / "ckpt/versions").iterdir():
        (version / "latest_checkpointed_iteration.txt").rename(version / "latest")
    base = next((copy.path / "ckpt/versions").glob("pretrain_focused*"))
    (base / "latest").rename(base / "latest_checkpointed_iteration.txt")
    run_until(copy, copy.command("ckpt/sft"), lambda: inside() and sft_begun(copy), signal.SIGKILL)
    left = newest(copy.path / "ckpt", "sft-*")
    again = copy.snakemake("ckpt/sft")
    assert again.status == 0, again.output[-3000:]
    assert left >= 4 and f"continues after step {left}" in again.output
    assert weights(copy.path / "ckpt/sft") == weights(undisturbed)
    assert metrics(copy.path / "ckpt/sft") == metrics(undisturbed)
    assert (copy.path / "ckpt/sft/answers/step_0000010.json").read_text() == answers


def sft_begun(copy: Workspace) -> bool:
    return exists(copy.path / "ckpt", "versions/sft-*/iter_0000004")()


# What each rule leaves half-written, in the order in which a run that is killed in each comes to them.
PARTIAL = {
    "sample_corpus": "data/sample/*/.part_*.partial",
    "build_tokenizer": "data/tokenizer/.*.partial",
    "tokenize_shard": "data/tokens/*/*/.*.partial",
    "render_chat": "data/chat/*/.*.partial",
    "pack_sft": "data/sft/*/*/.*.partial",
    "blend_sft": "data/sft/.*.partial",
    "index_pretrain": "data/pretrain/broad/.index.partial/*-sample_index.npy",
}
MADE = ("sample", "tokenizer", "tokens", "chat", "sft", "pretrain")
BESIDE = {"render_chat": ("chat", "sft"), "index_pretrain": ("pretrain",)}  # made beside the rule before
DATA = ("data/sft/blend.json", "data/pretrain/broad/index")


@pytest.fixture(scope="module")
def killed_data(finished: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Kills:
    """Data that is made from nothing while every rule is killed, one after the other."""
    workspace = copy_of(finished, tmp_path_factory.mktemp("killed_data") / "work")
    shutil.rmtree(workspace.path / "ckpt")
    shutil.rmtree(workspace.path / "data")
    kills = Kills(workspace, finished.path / "data")

    def forget(*directories: str) -> None:
        for directory in directories:
            shutil.rmtree(workspace.path / "data" / directory, ignore_errors=True)

    for rule, partial in PARTIAL.items():
        forget(*BESIDE.get(rule, ()))
        from_here = MADE[MADE.index(Path(partial).parts[1]) :]
        command, moment = workspace.command(*DATA), exists(workspace.path, partial)
        kills.statuses[rule] = kill_in(workspace, command, moment, lambda names=from_here: forget(*names))
    result = workspace.snakemake(*DATA)
    assert result.status == 0, result.output[-3000:]
    return kills


@pytest.mark.parametrize("rule", PARTIAL)
def test_killed_data_rules_end_with_the_same_files(killed_data: Kills, rule: str):
    assert killed_data.statuses[rule] == -signal.SIGKILL
    expected, data = contents(killed_data.undisturbed), killed_data.workspace.path / "data"
    found = contents(data)
    assert found == {name: digest for name, digest in expected.items() if name in found}
    assert {"sft/blend.json", "tokens/code/train/part_0.bin", "tokenizer/tokenizer.json"} <= found.keys()
    directory = Path(PARTIAL[rule]).parts[1]
    assert any(name.startswith(f"{directory}/") for name in found)
    assert not list(data.rglob(".*.partial"))


def contents(root: Path) -> dict[str, str]:
    """Hashes of all files but the records, which hold times."""
    files = [p for p in root.rglob("*") if p.is_file() and not is_record(p)]
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def is_record(path: Path) -> bool:
    return path.suffix == ".json" and b'"created"' in path.read_bytes()


def test_ctrl_c_stops_cleanly_and_the_run_continues(copy: Workspace):
    """The published path goes on naming the last good version."""
    target = "ckpt/pretrain/broad"
    undisturbed = begin_again(copy, target)
    (copy.path / target).symlink_to(undisturbed)
    for version in (copy.path / "ckpt/versions").iterdir():
        version.rename(copy.path / version.name)
    command = copy.command(target, "--forcerun", "pretrain")
    status, output = run_until(copy, command, first_line(copy.path / "ckpt"), signal.SIGINT)
    assert status != 0
    assert "stopped by SIGINT after step" in output and "run the same command again" in output
    assert "Traceback" not in output
    assert (copy.path / target).resolve() == undisturbed
    again = copy.snakemake(target)
    assert again.status == 0, again.output[-3000:]
    assert "continues after step" in again.output
    assert weights(copy.path / target) == weights(undisturbed)
    assert metrics(copy.path / target) == metrics(undisturbed)


def test_a_published_checkpoint_survives_every_rerun(copy: Workspace):
    """Other settings get a version of their own; going back finds the first one finished."""
    first = (copy.path / "ckpt/sft").resolve()
    before = weights(first)
    assert copy.snakemake("ckpt/sft", config=("sft={train_iters: 4}",)).status == 0
    second = (copy.path / "ckpt/sft").resolve()
    assert second != first and weights(first) == before
    back = copy.snakemake("ckpt/sft")
    assert back.status == 0 and "these settings were trained before" in back.output
    assert (copy.path / "ckpt/sft").resolve() == first
    assert copy.snakemake("-n", "ckpt/sft").jobs == {}
    pruned = copy.run("python", "scripts/prune_versions.py", "--ckpt", "ckpt")
    assert pruned.status == 0 and second.name in pruned.output
    assert not second.exists() and weights(first) == before
