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


def weights(checkpoint: Path, step: str = "") -> dict[str, str]:
    """Hashes of the files with tensors (model and optimizer) of the final checkpoint, or of another step."""
    root = checkpoint / step if step else max(checkpoint.glob("iter_*"))
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in root.glob("*.distcp")}
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


def new_lines(root: Path) -> Callable[[], bool]:
    """Two steps more than the newest checkpoint, since an attempt has begun again there.

    It removes the heartbeat and the lines of metrics that the one before left, in this order.
    """
    (version,) = (root / "versions").iterdir()
    (version / "progress.json").unlink(missing_ok=True)
    left = newest(root, "*")

    def reached() -> bool:
        if not (version / "progress.json").exists():
            return False
        lines = (version / "metrics.jsonl").read_text().splitlines()
        return any(json.loads(line)["iteration"] >= left + 2 for line in lines)

    return reached


# In the order in which a training comes to them that is stopped at each and started again.
MOMENTS = {
    "at start": lambda root: exists(root, "versions/*/config.yaml"),
    "before the first checkpoint": first_line,
    "inside a checkpoint write": half_written,
    "by Ctrl-C": new_lines,
    "inside a write in the background": half_written,
    "after a checkpoint": lambda root: saved(root, 8),
    "before publishing": lambda root: saved(root, 12),
}
OF_ONE_TEST = ("by Ctrl-C", "inside a write in the background")
TARGET = "ckpt/pretrain/broad"


@dataclass
class Kills:
    """A workspace in which one kill followed the other. What each did: status, output, what was published."""

    workspace: Workspace
    undisturbed: Path
    statuses: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    published: dict[str, Path] = field(default_factory=dict)


@pytest.fixture(scope="module")
def killed(finished: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Kills:
    """A pretraining that is killed at each moment, or stopped by Ctrl-C, and then left to end.

    Ctrl-C comes while the published path names the undisturbed version. From then on checkpoints are written
    in the background. All are kept, since the step that Ctrl-C saves may come before the eighth or after it.
    """
    workspace = copy_of(finished, tmp_path_factory.mktemp("killed") / "work")
    kills, ckpt = Kills(workspace, begin_again(workspace, TARGET)), workspace.path / "ckpt"
    for version in list((ckpt / "versions").iterdir()):  # so that only the killed version is looked at
        version.rename(workspace.path / version.name)
    config = ("pretrain={keep_checkpoints: 9}",)
    for moment, reached in MOMENTS.items():
        interrupted, arguments = moment == "by Ctrl-C", [TARGET]
        if interrupted:
            (workspace.path / TARGET).symlink_to(kills.undisturbed)
            arguments += ["--forcerun", "pretrain"]
        number = signal.SIGINT if interrupted else signal.SIGKILL
        command = workspace.command(*arguments, config=config)
        kills.statuses[moment], kills.outputs[moment] = run_until(workspace, command, reached(ckpt), number)
        if (workspace.path / TARGET).exists():
            kills.published[moment] = (workspace.path / TARGET).resolve()
        if interrupted:
            (workspace.path / TARGET).unlink()
            config = ("pretrain={keep_checkpoints: 9, save_in_background: true}",)
    again = workspace.snakemake(TARGET, config=config)
    assert again.status == 0, again.output[-3000:]
    return kills


def is_as_undisturbed(killed: Kills) -> None:
    """The weights of both checkpoints that the undisturbed one kept, and all metrics."""
    made = killed.workspace.path / TARGET
    for step in ("iter_0000008", "iter_0000012"):
        assert weights(made, step) == weights(killed.undisturbed, step)
    assert metrics(made) == metrics(killed.undisturbed)
    assert list((killed.workspace.path / "ckpt/versions").glob("*/.*.partial")) == []


@pytest.mark.parametrize("moment", [moment for moment in MOMENTS if moment not in OF_ONE_TEST])
def test_a_killed_pretraining_ends_as_an_undisturbed_one(killed: Kills, moment: str):
    assert killed.statuses[moment] == -signal.SIGKILL and moment not in killed.published
    is_as_undisturbed(killed)


def test_killed_while_a_checkpoint_is_written_in_the_background(killed: Kills):
    """The bytes are those of a run that waited for its checkpoints."""
    assert killed.statuses["inside a write in the background"] == -signal.SIGKILL
    is_as_undisturbed(killed)


def test_ctrl_c_stops_cleanly_and_the_run_continues(killed: Kills):
    """The published path goes on naming the last good version."""
    output = killed.outputs["by Ctrl-C"]
    assert killed.statuses["by Ctrl-C"] != 0
    assert "stopped by SIGINT after step" in output and "run the same command again" in output
    assert "Traceback" not in output
    assert killed.published == {"by Ctrl-C": killed.undisturbed.resolve()}
    assert "continues after step" in killed.outputs["inside a write in the background"]
    is_as_undisturbed(killed)


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
