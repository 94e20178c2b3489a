"""Version directories: found again by what defines them, owned by one process, published by a link."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from snaketron import files
from snaketron.jobs import version as versions
from snaketron.log import UserError

import pytest

SETTINGS = {"stage": "pretrain/broad", "optimizer": {"learning_rate": 0.1}}


def version(root: Path, name: str, *, age: float = 0) -> Path:
    """A finished version; `age` in seconds."""
    directory = root / "versions" / name
    directory.mkdir(parents=True)
    files.write_json(
        directory / "record.json",
        {"kind": "checkpoint", "name": "sft", "key": "k", "outputs": [], "counts": {}},
    )
    os.utime(directory, (time.time() - age,) * 2)
    return directory


@pytest.fixture
def owner(tmp_path: Path):
    """Another process that owns tmp_path/version until it is killed."""
    code = (
        "import sys, time, pathlib; from snaketron.jobs import version as versions; "
        "f = versions.own(pathlib.Path(sys.argv[1])); print('mine', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "version")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"SLURM_JOB_ID": "77"}
    )
    assert process.stdout is not None and process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_key_is_that_of_the_settings_and_the_inputs():
    key = versions.version_key(SETTINGS, ["a", "b"])
    assert len(key) == 12 and set(key) <= set("0123456789abcdef")
    assert key == versions.version_key(dict(reversed(SETTINGS.items())), ["a", "b"])  # in any order
    changed = [
        versions.version_key(SETTINGS | {"stage": "pretrain/focused"}, ["a", "b"]),
        versions.version_key(SETTINGS | {"optimizer": {"learning_rate": 0.2}}, ["a", "b"]),
        versions.version_key(SETTINGS, ["a", "c"]),
        versions.version_key(SETTINGS, ["a"]),
        versions.version_key(SETTINGS, ["b", "a"]),  # the blend of one is not the tokenizer of the other
    ]
    assert len({key, *changed}) == 6


@pytest.mark.parametrize(
    ("output", "stage", "expected"),
    [
        ("ckpt/sft", "sft", "ckpt/versions/sft-0a"),
        ("ckpt/pretrain/broad", "pretrain/broad", "ckpt/versions/pretrain_broad-0a"),
        ("/scratch/me/ckpt/sft", "sft", "/scratch/me/ckpt/versions/sft-0a"),
    ],
)
def test_versions_of_all_stages_lie_beside_each_other(output: str, stage: str, expected: str):
    assert versions.version_directory(Path(output), stage, "0a") == Path(expected)


def test_publish_makes_a_relative_link_that_survives_a_move(tmp_path: Path):
    directory = version(tmp_path / "ckpt", "sft-0a")
    versions.publish(directory, tmp_path / "ckpt/pretrain/broad")
    assert (tmp_path / "ckpt/pretrain/broad").readlink() == Path("../versions/sft-0a")
    (tmp_path / "ckpt").rename(tmp_path / "moved")
    assert (tmp_path / "moved/pretrain/broad/record.json").exists()


def test_publish_replaces_a_link_and_leaves_nothing_beside_it(tmp_path: Path):
    first, second = version(tmp_path, "sft-0a"), version(tmp_path, "sft-0b")
    versions.publish(first, tmp_path / "sft")
    files.partial(tmp_path / "sft").symlink_to("versions/sft-0a")  # of a publication that was killed
    versions.publish(second, tmp_path / "sft")
    assert (tmp_path / "sft").resolve() == second
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sft", "versions"]
    assert versions.is_finished(first)  # what was trained before stays


def test_a_reader_always_finds_a_checkpoint_while_it_is_replaced(tmp_path: Path):
    """In one step: a process that looks all the time never sees the link missing."""
    both = version(tmp_path, "sft-0a"), version(tmp_path, "sft-0b")
    versions.publish(both[0], tmp_path / "sft")
    code = (
        "import os, sys, pathlib\n"
        "print('ready', flush=True)\n"
        "while not os.path.exists(sys.argv[2]):\n"
        "    assert os.path.exists(sys.argv[1] + '/record.json')"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "sft"), str(tmp_path / "stop")]
    reader = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert reader.stdout is not None and reader.stdout.readline() == "ready\n"
    for i in range(300):
        versions.publish(both[i % 2], tmp_path / "sft")
    (tmp_path / "stop").touch()
    assert reader.wait() == 0
    reader.stdout.close()


def test_publish_stamps_an_old_version_as_new(tmp_path: Path):
    """Snakemake takes the time of a directory from this file; an old one would look out of date."""
    directory = version(tmp_path, "sft-0a", age=1000)
    began = time.time() - 0.1
    versions.publish(directory, tmp_path / "sft")
    assert (tmp_path / "sft/.snakemake_timestamp").stat().st_mtime >= began


def test_publish_does_not_touch_a_real_directory(tmp_path: Path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/mine.txt").write_text("mine")
    with pytest.raises(UserError, match="sft is a directory, not a link to a version; move it away"):
        versions.publish(version(tmp_path, "sft-0a"), tmp_path / "sft")
    assert (tmp_path / "sft/mine.txt").read_text() == "mine"


def test_a_version_has_one_owner_until_that_is_killed(tmp_path: Path, owner: subprocess.Popen):
    directory = tmp_path / "version"
    with pytest.raises(UserError) as error:
        versions.own(directory)
    assert f"{directory}: process {owner.pid} on " in str(error.value) and "Slurm job 77" in str(error.value)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with versions.own(directory):
        assert files.read_json(directory / versions.OWNER)["process"] == os.getpid()


def test_a_version_in_use_is_not_removed(tmp_path: Path, owner: subprocess.Popen):
    with pytest.raises(UserError, match=f"process {owner.pid}"):
        versions.remove(tmp_path / "version")
    assert (tmp_path / "version" / versions.OWNER).exists()
    owner.kill()
    owner.wait()
    versions.remove(tmp_path / "version")
    assert not (tmp_path / "version").exists()


def test_unpublished_are_the_versions_without_a_link_oldest_first(tmp_path: Path):
    for name, age in (("sft-new", 10), ("sft-old", 30), ("sft-used", 40), ("pretrain_broad-used", 20)):
        version(tmp_path, name, age=age)
    versions.publish(tmp_path / "versions/sft-used", tmp_path / "sft")
    versions.publish(tmp_path / "versions/pretrain_broad-used", tmp_path / "pretrain/broad")
    (tmp_path / "versions/latest").symlink_to("sft-new")  # not of ours, and not a publication
    (tmp_path / "versions/notes.txt").write_text("")
    assert [v.name for v in versions.unpublished(tmp_path)] == ["sft-old", "sft-new"]


def test_without_versions_none_is_unpublished(tmp_path: Path):
    assert list(versions.unpublished(tmp_path)) == []


def test_the_identity_of_a_checkpoint_is_its_stage_and_key(tmp_path: Path):
    versions.publish(version(tmp_path, "sft-k"), tmp_path / "some_name")
    assert versions.identity(tmp_path / "some_name") == "sft-k"


def test_an_unfinished_checkpoint_has_no_identity(tmp_path: Path):
    with pytest.raises(
        UserError, match=r"not a finished checkpoint of this workflow \(it has no record.json"
    ):
        versions.identity(tmp_path)
