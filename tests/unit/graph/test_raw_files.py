"""Which files of the user a finished job has to be run again for."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from snaketron.graph import raw_files
from snaketron.graph.raw_files import RawFiles
from snaketron.lineage.record import making, of_user

import pytest

LONG_AGO = 1_000_000_000  # seconds since 1970


@pytest.fixture(autouse=True)
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job that read a.jsonl and b.jsonl of the user; its record."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Path(f"{name}.jsonl").write_text(name, encoding="utf-8")
        os.utime(f"{name}.jsonl", (LONG_AGO, LONG_AGO))
    return write_record()


def write_record() -> Path:
    record = Path("data/tokens/docs/a.json")
    with making("tokens", "docs/a", outputs={}, record=record) as job:
        job.inputs = {"text": [of_user(Path("a.jsonl")), of_user(Path("b.jsonl"))]}
    return record


def without_times(record: Path) -> None:
    """The record as that of a tokenizer is, whose files are in a directory of the user."""
    value = json.loads(record.read_text(encoding="utf-8"))
    for entry in value["inputs"]:
        del entry["bytes"], entry["modified"]
    record.write_text(json.dumps(value), encoding="utf-8")


def changed(*files: str) -> list[str]:
    """Those of the files that a new start of Snakemake would run the job again for."""
    files = files or ("a.jsonl", "b.jsonl")
    workflow = SimpleNamespace(iocache=SimpleNamespace(mtime={}), dag=SimpleNamespace(forcefiles=set()))
    marked = RawFiles(workflow, Path("data"), Path("hashes")).seen_by("tokens/docs/a.json", files)
    assert marked == list(files)
    old = {file for file in marked if getattr(file, "flags", {}).get("ancient")}
    new = workflow.iocache.mtime
    assert not old & new.keys()
    assert all(time.time() - 60 < state.local_or_storage(follow_symlinks=True) for state in new.values())
    return [file for file in files if file not in old]


def replace(name: str, text: str, seconds: float = LONG_AGO) -> None:
    """As `cp -p` and `rsync -a` do it: with the time of the other file."""
    Path(f"{name}.other").write_text(text, encoding="utf-8")
    os.utime(f"{name}.other", (seconds, seconds))
    Path(f"{name}.other").rename(name)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were read for their hash."""
    found: list[str] = []
    sha256 = raw_files.sha256
    monkeypatch.setattr(raw_files, "sha256", lambda path: found.append(str(path)) or sha256(path))
    return found


def test_nothing_is_read_where_size_and_time_are_those_of_the_record(hashed: list[str]):
    assert changed() == [] and hashed == []


def test_a_file_with_an_older_time_and_other_content_is_changed(hashed: list[str]):
    replace("a.jsonl", "x", LONG_AGO - 1000)
    assert changed() == ["a.jsonl"] and hashed == ["a.jsonl"]
    replace("b.jsonl", "longer", LONG_AGO)  # of another size: need not be read
    assert changed() == ["a.jsonl", "b.jsonl"] and hashed == ["a.jsonl"]
    write_record()
    assert changed() == []


def test_a_changed_file_is_later_than_what_a_clock_ahead_wrote(finished: Path):
    tomorrow = time.time() + 86_400
    os.utime(finished, (tomorrow, tomorrow))
    replace("a.jsonl", "longer")
    workflow = SimpleNamespace(iocache=SimpleNamespace(mtime={}))
    RawFiles(workflow, Path("data"), Path("hashes")).seen_by("tokens/docs/a.json", ["a.jsonl", "b.jsonl"])
    ((file, state),) = workflow.iocache.mtime.items()
    assert file == "a.jsonl" and state.local_or_storage(follow_symlinks=True) > tomorrow


def test_a_touched_file_is_read_once_and_not_changed(hashed: list[str]):
    Path("a.jsonl").touch()
    assert changed() == [] and hashed == ["a.jsonl"]
    assert changed() == [] and hashed == ["a.jsonl"]
    replace("a.jsonl", "x", Path("a.jsonl").stat().st_mtime + 1)
    assert changed() == ["a.jsonl"] == changed() and hashed == ["a.jsonl"] * 2


def test_a_job_that_has_lost_its_record_is_still_to_run(finished: Path):
    """It deletes its outputs and fails, or is killed: what was made of the old file is there, and newer."""
    replace("a.jsonl", "other")
    assert changed() == ["a.jsonl"]
    finished.unlink()
    dag = SimpleNamespace(forcefiles=set())
    workflow = SimpleNamespace(iocache=SimpleNamespace(mtime={}), dag=dag)
    RawFiles(workflow, Path("data"), Path("hashes")).seen_by("tokens/docs/a.json", ["a.jsonl", "b.jsonl"])
    assert dag.forcefiles == {str(finished)} and set(workflow.iocache.mtime) == {"a.jsonl"}
    write_record()
    assert changed() == []
    finished.unlink()  # by the user, who needs the space: nothing was changed
    RawFiles(workflow, Path("data"), Path("hashes")).seen_by("tokens/docs/b.json", ["a.jsonl"])
    dag.forcefiles.clear()
    RawFiles(workflow, Path("data"), Path("hashes")).seen_by("tokens/docs/a.json", ["a.jsonl", "b.jsonl"])
    assert dag.forcefiles == set()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("{")])
def test_a_record_that_is_gone_is_still_known(
    finished: Path, hashed: list[str], damage: Callable[[Path], Any]
):
    """The user has deleted a shard for its space, and the time of its raw file is older then."""
    dag = SimpleNamespace(forcefiles=set())
    run = RawFiles(SimpleNamespace(iocache=SimpleNamespace(mtime={}), dag=dag), Path("data"), Path("hashes"))
    finished.rename("aside")
    run.seen_by("tokens/docs/a.json", ["a.jsonl"])  # at the start of the run that makes the shard
    Path("aside").rename(finished)
    run.keep()
    damage(finished)
    assert changed() == [] == hashed and dag.forcefiles == set()
    Path("a.jsonl").touch()
    assert changed() == [] and hashed == ["a.jsonl"]
    replace("a.jsonl", "x", LONG_AGO - 1000)
    assert changed() == ["a.jsonl"] == changed() and hashed == ["a.jsonl"] * 2


@pytest.mark.parametrize("others", [[], ["b.jsonl"]])
def test_a_job_that_reads_files_in_two_places_is_still_to_run(finished: Path, others: list[str]):
    """A filter reads text and perhaps models; only the text was changed."""

    def forced() -> set[str]:
        dag = SimpleNamespace(forcefiles=set())
        workflow = SimpleNamespace(iocache=SimpleNamespace(mtime={}), dag=dag)
        raw = RawFiles(workflow, Path("data"), Path("hashes"))
        for files in (others, ["a.jsonl"], others):
            raw.seen_by("tokens/docs/a.json", files)
        return dag.forcefiles

    replace("a.jsonl", "other")
    assert forced() == set()  # its record says enough
    finished.unlink()
    assert forced() == forced() == {str(finished)}
    write_record()
    assert forced() == set()
    finished.unlink()
    assert forced() == set()


def test_a_damaged_list_of_hashes_is_left(hashed: list[str]):
    Path("hashes").write_bytes(b'["a.jsonl", 1\n\xff\n3\n')
    Path("a.jsonl").touch()
    assert changed() == [] and hashed == ["a.jsonl"]


def test_a_file_of_which_a_record_has_no_time_is_read_once(finished: Path, hashed: list[str]):
    without_times(finished)
    assert changed() == changed() == [] and hashed == ["a.jsonl", "b.jsonl"]
    replace("a.jsonl", "x", LONG_AGO - 1000)
    assert changed() == changed() == ["a.jsonl"] and hashed == ["a.jsonl", "b.jsonl", "a.jsonl"]


def test_without_a_record_and_for_other_files_snakemake_decides(finished: Path):
    workflow = SimpleNamespace(iocache=SimpleNamespace(mtime={}))
    raw = RawFiles(workflow, Path("data"), Path("hashes"))
    files = ["c.jsonl", "<data>/raw/web/a.parquet", "data/sample/docs/part_0.jsonl"]
    assert raw.seen_by("tokens/docs/a.json", files) == files
    assert raw.seen_by("tokens/docs/none.json", ["a.jsonl"]) == ["a.jsonl"]
    finished.write_text("{", encoding="utf-8")
    raw = RawFiles(workflow, Path("data"), Path("hashes"))
    assert raw.seen_by("tokens/docs/a.json", ["a.jsonl"]) == ["a.jsonl"]
    assert workflow.iocache.mtime == {}
    assert not any(hasattr(file, "flags") for file in files)


def test_a_changed_directory_of_a_tokenizer_runs_its_rule_again(tmp_path: Path):
    """Neither a touched file nor a directory that is gone does."""
    directory = Path("my_tokenizer")
    directory.mkdir()
    (directory / "tokenizer.json").write_text("one")
    with making("tokenizer", "tokenizer", outputs={}, record=Path("data/tokenizer/record.json")) as job:
        job.inputs = {"origin": [directory / "tokenizer.json"]}

    def forced() -> set[str]:
        dag = SimpleNamespace(forcerules=set())
        watching = RawFiles(SimpleNamespace(dag=dag, get_rule=str), Path("data"), Path("hashes"))
        for _ in range(2):
            watching.watch_directory("build_tokenizer", "tokenizer/record.json", directory)
        return dag.forcerules

    assert forced() == set()
    (directory / "tokenizer.json").touch()
    assert forced() == set()
    (directory / "tokenizer.json").write_text("two")
    os.utime(directory / "tokenizer.json", (LONG_AGO, LONG_AGO))
    assert forced() == {"build_tokenizer"}
    Path("data/tokenizer/record.json").unlink()  # its rule has begun to run again and failed, or the user has
    assert forced() == {"build_tokenizer"}
    (directory / "tokenizer.json").unlink()
    assert forced() == set()
