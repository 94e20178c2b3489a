"""Records: what they say, and when they are refused."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

from snaketron import files
from snaketron.lineage import provenance
from snaketron.lineage.record import Entry, making, of_file, read
from snaketron.log import UserError

import pytest


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_a_record_says_what_went_in_and_what_came_out(tmp_path: Path):
    raw, final = write(tmp_path / "raw", "abc"), write(tmp_path / "out", "old")
    path = tmp_path / "record.json"
    with making("tokens", "docs/a", outputs={"train.bin": final}, record=path) as job:
        job.aside["train.bin"].write_text("four")
        assert final.read_text() == "old"
        job.inputs = {"text": [raw], "tokenizer": Entry("other", "t.json", "ff")}
        job.settings, job.counts = {"corpus": "docs"}, {"documents": 3}
    record = read(path)
    assert record == job.record
    assert (record.kind, record.name, record.settings, record.counts, record.key) == (
        *("tokens", "docs/a", {"corpus": "docs"}, {"documents": 3}),
        None,
    )
    assert record.inputs == (
        Entry("text", str(raw), files.sha256(raw)),
        Entry("tokenizer", "t.json", "ff"),  # by what it is to this job
    )
    assert record.outputs == (Entry("train.bin", str(final), files.sha256(final), 4),)
    assert final.read_text() == "four"
    assert record.versions["python"] == platform.python_version()
    assert record.versions.keys() >= {"snaketron", "torch", "megatron-core"}
    assert datetime.fromisoformat(record.created).tzinfo is not None


def test_a_record_says_the_code_the_hardware_and_the_cost(tmp_path: Path):
    with making("k", "n", outputs={}, record=tmp_path / "own.json") as job:
        sum(range(10**6))
    about = read(tmp_path / "own.json").provenance
    assert about["hardware"].items() >= {"cpus": len(os.sched_getaffinity(0))}.items()
    assert about["hardware"]["memory_gb"] > 0 and about["cost"]["cpu_seconds"] >= 0.01
    with making("k", "n", outputs={}, record=tmp_path / "more.json") as job:
        job.hardware, job.cost = {"nodes": 2}, {"gpu_seconds": 7200}
    about = read(tmp_path / "more.json").provenance
    assert about["hardware"]["nodes"] == 2 and about["cost"] == {"gpu_seconds": 7200}


def test_the_code_is_the_commit_of_the_clone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    package = tmp_path / "clone/scripts/snaketron/lineage/provenance.py"
    write(package, "1")
    monkeypatch.setattr(provenance, "__file__", str(package))
    assert provenance.code.__wrapped__() == {}  # no clone

    def git(*command: str) -> str:
        named = ("-c", "user.name=a", "-c", "user.email=a@b.example")
        told = subprocess.run(
            ["git", *named, *command], cwd=tmp_path / "clone", capture_output=True, text=True
        )
        return told.stdout.strip()

    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    commit = {"commit": git("rev-parse", "HEAD")}
    write(tmp_path / "clone/data.yaml", "no code")
    assert provenance.code.__wrapped__() == commit | {"clean": True}
    write(tmp_path / "clone/rules/new.smk", "rule new:")
    assert provenance.code.__wrapped__() == commit | {"clean": False}


def test_inputs_and_outputs_have_names(tmp_path: Path):
    one, two = (write(tmp_path / name, name) for name in ("one", "two"))
    with making("k", "n", outputs={"a": tmp_path / "a"}, record=tmp_path / "a.json") as job:
        job.aside["a"].write_text("made")
        job.inputs = {"text": [one, two], "tokenizer": one}
        job.present = [of_file("b", two)]
    assert [entry.file for entry in job.record.inputs_named("text")] == [one, two]
    assert [entry.file for entry in job.record.inputs_named("tokenizer")] == [one]
    assert job.record.output("b").file == two
    with pytest.raises(KeyError, match="the record of k n has no output 'c'"):
        job.record.output("c")


def test_an_output_whose_hash_is_known_is_not_read_again(tmp_path: Path):
    outputs = {name: tmp_path / name for name in ("one", "two")}
    with making("k", "n", outputs=outputs, record=tmp_path / "record.json") as job:
        for path in job.aside.values():
            path.write_text("four")
        job.hashes["one"] = "ff"
    assert [entry.sha256 for entry in job.record.outputs] == ["ff", files.sha256(tmp_path / "two")]


def test_the_time_counts_from_the_beginning_of_the_block_or_as_told(tmp_path: Path):
    with making("k", "n", outputs={}, record=tmp_path / "a.json") as block:
        time.sleep(0.05)
    with making("k", "n", outputs={}, record=tmp_path / "b.json", started=time.monotonic() - 100) as told:
        pass
    assert 0.05 <= block.record.seconds < 50 and told.record.seconds >= 100


def test_a_job_that_fails_leaves_nothing(tmp_path: Path):
    outputs = {"a": tmp_path / "made/a"}
    with pytest.raises(RuntimeError), making("k", "n", outputs=outputs, record=tmp_path / "made/r") as job:
        job.aside["a"].write_text("half")
        raise RuntimeError
    assert not list((tmp_path / "made").iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_job_that_is_killed_publishes_nothing(tmp_path: Path, number: signal.Signals):
    code = (
        "import sys, time; from pathlib import Path; from snaketron.lineage.record import making\n"
        "from snaketron.log import run\n"
        "def main():\n"
        "    with making('k', 'n', outputs={'a': Path('a')}, record=Path('r.json')) as job:\n"
        "        job.aside['a'].write_text('half'); print('writing', flush=True); time.sleep(60)\n"
        "run(main)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    job = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert job.stdout is not None and job.stdout.readline() == "writing\n"
    job.send_signal(number)
    job.communicate()
    left = sorted(path.name for path in tmp_path.iterdir())
    # Nothing can tidy up after SIGKILL; the next attempt takes the same temporary names.
    assert left == ([] if number == signal.SIGTERM else [".a.partial", ".r.json.partial"])
    with making("k", "n", outputs={"a": tmp_path / "a"}, record=tmp_path / "r.json") as again:
        again.aside["a"].write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "r.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such record; the rule that makes it has not finished"),
        ('{"kind": ', "not a lineage record ("),
        ("[1]", "not a lineage record; delete it and run again"),
        ('{"kind": "tokens", "outputs": []}', "not a lineage record; delete it and run again"),
        ('{"kind": "k", "outputs": [{"size": 1}], "counts": {}}', "not a lineage record; delete it"),
    ],
)
def test_what_is_no_record_is_named(tmp_path: Path, text: str | None, message: str):
    path = tmp_path / "record.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_a_damaged_record_of_a_published_checkpoint_goes_with_its_link(tmp_path: Path):
    version = tmp_path / "versions/sft-1"
    version.mkdir(parents=True)
    (version / "record.json").write_text('{"kind": ')
    (tmp_path / "sft").symlink_to("versions/sft-1")
    with pytest.raises(UserError, match=f"delete it and the link {tmp_path}/sft and run again$"):
        read(tmp_path / "sft/record.json")
