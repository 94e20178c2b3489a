"""Version directories: found again by what defines them, and published by a link."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from snaketron import files
from snaketron.jobs.version import Description, Version, version_key
from snaketron.lineage.record import Entry, making
from snaketron.log import UserError
from tests.records import record

import pytest
import yaml

SETTINGS = {"stage": "pretrain/broad", "optimizer": {"learning_rate": 0.1}}


def make(root: Path, name: str, *, age: float = 0) -> Version:
    """A finished version; `age` in seconds."""
    version = Version(root / "versions" / name)
    files.write_json(version.record, record("checkpoint", "sft", key="k"))
    os.utime(version.directory, (time.time() - age,) * 2)
    return version


def test_the_key_is_that_of_the_settings_and_the_inputs():
    key = version_key(SETTINGS, ["a", "b"])
    assert len(key) == 12 and set(key) <= set("0123456789abcdef")
    assert key == version_key(dict(reversed(SETTINGS.items())), ["a", "b"])  # in any order
    changed = [
        version_key(SETTINGS | {"stage": "pretrain/focused"}, ["a", "b"]),
        version_key(SETTINGS | {"optimizer": {"learning_rate": 0.2}}, ["a", "b"]),
        version_key(SETTINGS, ["a", "c"]),
        version_key(SETTINGS, ["a"]),
        version_key(SETTINGS, ["b", "a"]),  # the blend of one is not the tokenizer of the other
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
    assert Version.of(Path(output), stage, "0a").directory == Path(expected)


def test_publish_makes_a_relative_link_that_survives_a_move(tmp_path: Path):
    make(tmp_path / "ckpt", "sft-0a").publish(tmp_path / "ckpt/pretrain/broad")
    assert (tmp_path / "ckpt/pretrain/broad").readlink() == Path("../versions/sft-0a")
    (tmp_path / "ckpt").rename(tmp_path / "moved")
    assert (tmp_path / "moved/pretrain/broad/record.json").exists()


def test_a_link_in_a_linked_directory_is_refused_before_the_training(tmp_path: Path):
    """From where it would lie, a relative link leads elsewhere. The root of all may be a link."""
    scratch, version = tmp_path / "scratch", make(tmp_path / "store", "sft-0a")
    scratch.mkdir()
    (tmp_path / "ckpt").symlink_to("store")
    (tmp_path / "store/pretrain").symlink_to(scratch)
    version = Version(tmp_path / "ckpt/versions/sft-0a")
    version.ask(tmp_path / "ckpt/sft")
    with pytest.raises(UserError, match=r"ckpt/pretrain is a link, from which \.\./versions/sft-0a is not"):
        version.ask(tmp_path / "ckpt/pretrain/broad")
    assert [*scratch.iterdir()] == []


def test_publish_replaces_a_link_and_leaves_nothing_beside_it(tmp_path: Path):
    first, second = make(tmp_path, "sft-0a"), make(tmp_path, "sft-0b")
    first.publish(tmp_path / "sft")
    files.partial(tmp_path / "sft").symlink_to("versions/sft-0a")  # of a publication that was killed
    second.publish(tmp_path / "sft")
    assert (tmp_path / "sft").resolve() == second.directory
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sft", "versions"]
    assert first.is_finished  # what was trained before stays


def test_what_outlived_its_run_does_not_replace_what_a_later_run_has_made(tmp_path: Path):
    """The first Snakemake was killed, its training went on, and a second one trained with other settings."""
    first, second, other = make(tmp_path, "sft-0a"), make(tmp_path, "sft-0b"), make(tmp_path, "lora-0a")
    for version in (first, second):
        version.ask(tmp_path / "sft")
    other.ask(tmp_path / "lora")
    second.publish(tmp_path / "sft")
    with pytest.raises(UserError) as error:
        first.publish(tmp_path / "sft")
    assert str(error.value) == (
        f"{tmp_path}/sft: a run has asked for sft-0b since, so sft-0a is complete and not published; run the "
        "same command again to publish it"
    )
    assert (tmp_path / "sft").resolve() == second.directory
    other.publish(tmp_path / "lora")
    first.ask(tmp_path / "sft")  # the same command again
    first.publish(tmp_path / "sft")
    assert (tmp_path / "sft").resolve() == first.directory


def test_a_reader_always_finds_a_checkpoint_while_it_is_replaced(tmp_path: Path):
    """In one step: a process that looks all the time never sees the link missing."""
    both = make(tmp_path, "sft-0a"), make(tmp_path, "sft-0b")
    both[0].publish(tmp_path / "sft")
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
        both[i % 2].publish(tmp_path / "sft")
    (tmp_path / "stop").touch()
    assert reader.wait() == 0
    reader.stdout.close()


def test_publish_stamps_an_old_version_as_new(tmp_path: Path):
    """Snakemake takes the time of a directory from this file; an old one would look out of date."""
    version = make(tmp_path, "sft-0a", age=1000)
    began = time.time() - 0.1
    version.publish(tmp_path / "sft")
    assert (tmp_path / "sft/.snakemake_timestamp").stat().st_mtime >= began


def test_publish_does_not_touch_a_real_directory(tmp_path: Path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/mine.txt").write_text("mine")
    with pytest.raises(UserError, match="sft is a directory, not a link to a version; move it away"):
        make(tmp_path, "sft-0a").publish(tmp_path / "sft")
    assert (tmp_path / "sft/mine.txt").read_text() == "mine"


def test_the_identity_of_a_checkpoint_is_its_stage_and_key(tmp_path: Path):
    make(tmp_path, "sft-k").publish(tmp_path / "some_name")
    assert Version(tmp_path / "some_name").identity == "sft-k"


def test_what_is_no_finished_checkpoint_has_no_identity(tmp_path: Path):
    (tmp_path / "file").touch()
    files.write_json(tmp_path / "tokenizer/record.json", record("tokenizer"))
    problems = {
        ".": "it has no record.json",
        "nowhere": "it is not there",
        "file": "it is no directory",
        "tokenizer": "its record is of the kind tokenizer",
    }
    for name, problem in problems.items():
        with pytest.raises(UserError, match=rf"not a finished checkpoint of this workflow \({problem}\)"):
            _ = Version(tmp_path / name).identity


def test_an_export_is_no_checkpoint_and_says_which_one_it_is_of(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for directory in ("hf/sft", "ckpt/versions/sft-0a"):
        Path(directory).mkdir(parents=True)
    with making("export", "sft", outputs={}, record=Path("hf/sft/record.json")) as job:
        job.inputs = {"checkpoint": Entry("checkpoint", "ckpt/versions/sft-0a", version="sft-0a")}
    of = r"its record is of the kind export, made of ckpt/versions/sft-0a; name that"
    with pytest.raises(UserError, match=of):
        Version(Path("hf/sft")).check_finished()


def test_the_latest_checkpoint_is_the_one_that_is_named_or_one_before_it(tmp_path: Path):
    """A checkpoint after the named one is complete on disk, but was not published."""
    version = Version(tmp_path)
    assert version.latest_iteration() is None
    for iteration in (100, 9, 20):
        version.iteration_directory(iteration).mkdir()
    assert version.iterations() == [9, 20, 100]
    version.latest.write_text("20")
    assert version.latest_iteration() == 20
    version.latest.write_text("release")
    with pytest.raises(UserError, match=r"latest_checkpointed_iteration.txt: 'release' is no iteration"):
        version.latest_iteration()
    version.latest.write_text("20")
    version.iteration_directory(20).rmdir()  # by a person, because it cannot be read
    assert version.latest_iteration() == 9


def test_the_files_of_answers_come_in_the_order_of_their_steps(tmp_path: Path):
    version = Version(tmp_path)
    assert version.all_answers() == []
    for iteration in (1000, 20, 0):
        files.write_json(version.answers_after(iteration), [])
    assert [path.name for path in version.all_answers()] == [
        "step_0000000.json",
        "step_0000020.json",
        "step_0001000.json",
    ]


def test_a_description_is_written_as_it_is_read(tmp_path: Path):
    """What was not trained here says not how it was run."""
    path, inputs = (
        tmp_path / "config.yaml",
        (Entry("", "data/blend.json", "ab"), Entry("", "ckpt/base", version="b-1")),
    )
    Description({"stage": "sft"}, inputs, "cd").write(path)
    written = yaml.safe_load(path.read_text())
    assert list(written) == ["settings", "inputs", "tokenizer_sha256"]
    assert written["inputs"] == [
        {"path": "data/blend.json", "sha256": "ab"},
        {"path": "ckpt/base", "version": "b-1"},
    ]
    found = Description.read(path)
    assert (found.stage, [*found.inputs], found.run) == ("sft", [*inputs], {})
    Description(found.settings, inputs, "cd", {"log_interval": 2}).write(path)
    names = ["settings", "run", "inputs", "tokenizer_sha256"]
    assert list(yaml.safe_load(path.read_text())) == names
    assert Description.read(path).run == {"log_interval": 2}
