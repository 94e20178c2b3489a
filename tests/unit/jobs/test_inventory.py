"""The versions that there are, their states, and those that nothing needs any more."""

from __future__ import annotations

import logging
import os
import re
import time
from pathlib import Path
from typing import Any

import prune_versions
from snaketron import files
from snaketron.jobs import inventory
from snaketron.jobs.owner import own
from snaketron.jobs.version import Version, version_key
from snaketron.sizes.outlook import Inputs, Progress
from tests.records import record

import pytest
import yaml


def make(
    root: Path, name: str, *, base: str = "", finished: bool = True, age: float = 0, **attempt: Any
) -> Version:
    """A version of 59 steps, `age` seconds old; `attempt` is its last one, saved after its `iteration`."""
    version = Version(root / "versions" / name)
    inputs = [
        {"path": "data/blend.json", "sha256": "b"},
        *([{"path": "base", "version": base}] if base else []),
    ]
    files.write_text(
        version.config,
        yaml.safe_dump({"settings": {"stage": "sft", "train_iters": 59}, "inputs": inputs}).encode(),
    )
    if finished:
        files.write_json(version.record, {})
    if attempt:
        files.write_json(version.attempts, [attempt])
        version.iteration_directory(attempt["iteration"]).mkdir()
        version.latest.write_text(str(attempt["iteration"]))
    for path in [*version.directory.iterdir(), version.directory]:
        os.utime(path, (time.time() - age,) * 2)
    return version


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    """A published SFT on a phase that was trained again since, a stopped one, and two that were replaced."""
    make(tmp_path, "pretrain_broad-1")
    make(tmp_path, "pretrain_broad-2").publish(tmp_path / "pretrain/broad")
    make(tmp_path, "pretrain_broad-0", age=3 * 3600)
    make(tmp_path, "sft-1", base="pretrain/broad-1").publish(tmp_path / "sft")
    make(tmp_path, "sft-0", base="pretrain/broad-0", age=72 * 3600)
    make(tmp_path, "sft-3", base="pretrain/broad-2", finished=False, iteration=30, outcome="stopped")
    (tmp_path / "versions/latest").symlink_to("sft-0")  # a person's, and not a publication
    (tmp_path / "versions/notes.txt").write_text("")
    return tmp_path


def deleted(ckpt: Path, *options: str) -> list[str]:
    before = {path.name for path in (ckpt / "versions").iterdir()}
    assert prune_versions.main(["--ckpt", str(ckpt), *options]) == 0
    return sorted(before - {path.name for path in (ckpt / "versions").iterdir()})


def test_a_root_without_versions_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """With `pathvars.ckpt` elsewhere it said that it would delete 0 of 0 versions."""
    assert prune_versions.main(["--dry-run", "--ckpt", str(tmp_path)]) == 0
    said = f"{tmp_path}/versions: holds no versions; --ckpt names the root of the checkpoints"
    assert caplog.messages[0] == said


def test_each_version_has_its_state_size_and_age(ckpt: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "snaketron"):
        assert deleted(ckpt, "--dry-run") == []
    said = [message.split(maxsplit=2) for message in caplog.messages]
    lines = {words[1]: " ".join([words[0], *words[2].split()]) for words in said if words[0] == "keep"}
    assert {name: re.split(r" [\d.]+ (?:s|min) ", line)[1] for name, line in lines.items()} == {
        "pretrain_broad-1": "finished, sft-1 was built on it",
        "pretrain_broad-2": f"finished, published as {ckpt}/pretrain/broad",
        "sft-1": f"finished, published as {ckpt}/sft",
        "sft-3": "stopped at step 30 of 59",
    }
    size = sum(path.stat().st_size for path in (ckpt / "versions/sft-0").rglob("*"))
    assert f"would delete sft-0 {size} bytes 3.0 days finished, superseded" in [
        " ".join(message.split()) for message in caplog.messages
    ]
    assert caplog.messages[-1].startswith("would delete 2 of 6 versions")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], ["pretrain_broad-0", "sft-0"]),
        (["--stopped"], ["pretrain_broad-0", "sft-0", "sft-3"]),
        (["--bases"], ["pretrain_broad-0", "pretrain_broad-1", "sft-0"]),
    ],
)
def test_what_is_published_interrupted_or_a_base_stays_unless_told(
    ckpt: Path, options: list[str], expected: list[str]
):
    assert deleted(ckpt, *options) == expected
    assert Version(ckpt / "sft").is_finished and Version(ckpt / "pretrain/broad").is_finished


def test_a_version_stays_for_a_link_of_a_person(ckpt: Path):
    (ckpt / "mine").symlink_to("versions/sft-0")
    assert "sft-0" not in deleted(ckpt)


def test_nothing_is_deleted_where_a_directory_may_not_be_read(ckpt: Path, monkeypatch: pytest.MonkeyPatch):
    """It may hold a link of a colleague. (To root every place is open.)"""
    (ckpt / "hers").mkdir()
    look = os.scandir

    def refuse(place: object) -> object:
        if str(place).endswith("hers"):
            raise PermissionError(13, "Permission denied", str(place))
        return look(place)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="hers"):
        deleted(ckpt)


def test_the_base_of_an_interrupted_training_stays_with_it(tmp_path: Path):
    """Without the base it could not be continued; without the interrupted training nobody needs the base."""
    make(tmp_path, "pretrain_broad-1")
    make(tmp_path, "pretrain_focused-1", base="pretrain/broad-1")
    make(tmp_path, "sft-1", base="pretrain/focused-1", finished=False, iteration=4, outcome="stopped")
    assert deleted(tmp_path) == []
    assert deleted(tmp_path, "--stopped") == ["pretrain_broad-1", "pretrain_focused-1", "sft-1"]


def test_a_running_training_and_its_base_stay_whatever_is_told(tmp_path: Path):
    make(tmp_path, "pretrain_broad-1")
    running = make(tmp_path, "sft-1", base="pretrain/broad-1", finished=False)
    with own(running):
        (_, item) = inventory.inventory(tmp_path)
        assert item.state.startswith(f"running (process {os.getpid()} on ")
        assert deleted(tmp_path, "--stopped") == []


def test_a_training_that_waits_in_the_queue_to_go_on_stays_until_slurm_has_forgotten_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make(tmp_path, "pretrain_broad-1")
    waiting = make(
        tmp_path, "sft-1", base="pretrain/broad-1", finished=False, iteration=4, outcome="requeued"
    )
    files.write_json(waiting.owner, {"token": "a", "process": 12, "host": "node1", "job": "4711"})
    squeue = tmp_path / "bin/squeue"
    squeue.parent.mkdir()
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    squeue.write_text("#!/bin/sh\necho PENDING\n", encoding="utf-8")
    squeue.chmod(0o755)
    (_, item) = inventory.inventory(tmp_path)
    assert item.state == "stopped at step 4 of 59, may go on (process 12 on node1, Slurm job 4711)"
    assert deleted(tmp_path, "--stopped") == []
    squeue.write_text(
        "#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1\n", encoding="utf-8"
    )
    assert deleted(tmp_path, "--stopped") == ["pretrain_broad-1", "sft-1"]


def test_in_a_copy_of_a_run_it_is_said_that_slurm_cannot_be_asked_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """A machine without squeue may have the run's own files, by a network, or a copy of them."""
    waiting = make(tmp_path, "sft-1", finished=False, iteration=4, outcome="requeued")
    files.write_json(waiting.owner, {"token": "a", "process": 12, "host": "node1", "job": "4711"})
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    (item,) = inventory.inventory(tmp_path)
    asked = "process 12 on node1, Slurm job 4711; squeue: no such command"
    assert item.state == f"stopped at step 4 of 59, may go on ({asked})"
    assert deleted(tmp_path) == [] and "cannot be asked" not in caplog.text
    assert deleted(tmp_path, "--stopped") == []
    assert caplog.messages[-1] == (
        "sft-1 stays, since Slurm cannot be asked here whether its job goes on; give --stopped on a machine "
        f"of the cluster, or delete it yourself in {tmp_path}/versions if this is a copy of the run"
    )


@pytest.mark.parametrize(
    ("outcome", "state"),
    [
        ("stopped", "stopped at step 30 of 59"),
        ("time limit", "stopped at step 30 of 59"),
        ("failed", "failed at step 30 of 59"),
        ("hung", "hung at step 30 of 59"),
        (None, "killed at step 30 of 59"),  # it could not say anything
    ],
)
def test_the_state_says_how_it_ended_and_where_it_would_continue(tmp_path: Path, outcome, state: str):
    version = make(tmp_path, "sft-1", finished=False, iteration=30, outcome=outcome)
    assert inventory.state_of(version) == state


def test_a_version_that_was_killed_at_its_start_has_a_state_too(tmp_path: Path):
    version = Version(tmp_path / "versions/sft-1")
    version.directory.mkdir(parents=True)
    assert inventory.state_of(version) == "stopped at step 0"
    assert deleted(tmp_path) == []


def test_a_version_that_was_published_since_it_was_listed_stays(ckpt: Path):
    version = Version(ckpt / "versions/sft-0")
    version.publish(ckpt / "sft")
    assert not inventory.remove(version, ckpt) and version.is_finished


def test_what_a_killed_deletion_left_is_no_version_and_is_deleted(ckpt: Path):
    left = files.partial(ckpt / "versions/sft-9")
    left.mkdir()
    assert "sft-9" not in [item.name for item in inventory.inventory(ckpt)]
    assert left.name in deleted(ckpt)


def test_without_versions_nothing_is_deleted(tmp_path: Path):
    (tmp_path / "versions").mkdir()
    assert deleted(tmp_path) == []
    assert inventory.inventory(tmp_path / "nowhere") == []


def test_a_training_is_found_by_its_settings_and_inputs_with_the_speed_of_the_last_one(tmp_path: Path):
    settings, identities = {"stage": "pretrain/broad", "train_iters": 59}, ["blend", "tokenizer"]
    output, key = tmp_path / "pretrain/broad", version_key(settings, identities)
    last = make(tmp_path, "pretrain_broad-1")
    counts = {"tokens": 12_000, "train_seconds": 60.0}
    files.write_json(last.record, record("checkpoint", counts=counts))
    make(tmp_path, f"pretrain_broad-{key}", finished=False, iteration=30, outcome="stopped")
    identity = f"pretrain/broad-{key}"
    assert inventory.look(output, settings, Inputs(identities)) == Progress(identity, 30, False, 200.0)
    assert inventory.look(output, settings, Inputs(["blend", "other"])).done == 0
    assert inventory.look(output, settings, None) == Progress(None, 0, False, 200.0)  # data is made first
    assert inventory.look(tmp_path / "sft", {"stage": "sft"}, Inputs([])).tokens_per_second is None
