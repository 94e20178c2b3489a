"""Files that are complete or absent, also when the writer fails, is killed or has company."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from snaketron import files
from snaketron.log import UserError

import pytest

# Writes "slow" into sys.argv[1] and keeps it until the file sys.argv[2] appears.
SLOW = """
import pathlib, sys, time
from snaketron import files
with files.writing(pathlib.Path(sys.argv[1])) as (path,):
    path.write_text("slow")
    print("writing", flush=True)
    while not pathlib.Path(sys.argv[2]).exists():
        time.sleep(0.01)
"""
FAST = "import pathlib, sys; from snaketron import files; files.write_text(pathlib.Path(sys.argv[1]), 'fast')"


def start(code: str, *arguments: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said(process: subprocess.Popen) -> str:
    """Its next line of standard error, as soon as there is one."""
    assert process.stderr is not None
    return process.stderr.readline()


def everything(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


@pytest.fixture
def slow(tmp_path: Path):
    """Another process that is writing tmp_path/out until tmp_path/go exists."""
    process = start(SLOW, tmp_path / "out", tmp_path / "go")
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.communicate()


def test_files_appear_together_at_the_end(tmp_path: Path):
    first, second = tmp_path / "new/a.bin", tmp_path / "b.json"
    with files.writing(first, second) as temporary:
        assert temporary == [tmp_path / "new/.a.bin.partial", tmp_path / ".b.json.partial"]
        for path in temporary:
            path.write_text("x")
        assert not first.exists() and not second.exists()
    assert everything(tmp_path) == ["b.json", "new/a.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing_and_keeps_what_was_there(tmp_path: Path, error: type[BaseException]):
    (tmp_path / "a").write_text("old")
    with pytest.raises(error), files.writing(tmp_path / "a", tmp_path / "b") as (a, b):
        a.write_text("new")
        b.write_text("new")
        raise error
    assert everything(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "old"


def test_a_device_a_pipe_and_a_directory_stay_what_they_are(tmp_path: Path):
    """A rename would put a file in the place of /dev/stdout or of a pipe, for all programs."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(UserError, match=f"{name}: is a directory, a device or a pipe"):
            files.write_text(tmp_path / name, "text")
    assert (tmp_path / "pipe").is_fifo() and sorted(p.name for p in tmp_path.iterdir()) == ["folder", "pipe"]


def test_a_second_writer_waits_for_the_first(tmp_path: Path, slow: subprocess.Popen):
    fast = start(FAST, tmp_path / "out")
    assert f"waiting for another process that is writing {tmp_path}/.out.partial" in said(fast)
    assert fast.poll() is None and not (tmp_path / "out").exists()
    (tmp_path / "go").touch()
    assert slow.wait(timeout=300) == 0
    _, stderr = fast.communicate(timeout=300)
    assert fast.returncode == 0, stderr
    assert (tmp_path / "out").read_text() == "fast" and everything(tmp_path) == ["go", "out"]


def test_a_writer_that_failed_lets_the_next_one_write(tmp_path: Path, slow: subprocess.Popen):
    """The file that the second one waited for is removed, not renamed."""
    fast = start(FAST, tmp_path / "out")
    assert "waiting for another process" in said(fast)
    slow.terminate()
    assert fast.wait(timeout=300) == 0
    assert (tmp_path / "out").read_text() == "fast"


def test_a_killed_writers_leftover_is_replaced(tmp_path: Path, slow: subprocess.Popen):
    slow.kill()
    slow.wait()
    assert everything(tmp_path) == [".out.partial"]
    with files.writing(tmp_path / "out") as (path,):
        assert path.read_text() == ""  # nothing of the other one is in it
        path.write_text("new")
    assert everything(tmp_path) == ["out"] and (tmp_path / "out").read_text() == "new"


def test_json_is_indented_and_ends_in_a_newline(tmp_path: Path):
    files.write_json(tmp_path / "a.json", {"b": [1], "a": "é"})
    assert (tmp_path / "a.json").read_text() == '{\n  "b": [\n    1\n  ],\n  "a": "é"\n}\n'
    assert files.read_json(tmp_path / "a.json") == {"b": [1], "a": "é"}


def test_hashes_are_those_of_sha256(tmp_path: Path):
    files.write_text(tmp_path / "a", b"abc")
    assert files.sha256(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    assert files.sha256_of({"b": 1, "a": [2]}) == hashlib.sha256(b'{"a":[2],"b":1}').hexdigest()
    assert files.sha256_of({"a": [2], "b": 1}) == files.sha256_of({"b": 1, "a": [2]})


def test_a_missing_input_is_reported_as_such(tmp_path: Path):
    """And not taken for a temporary file that is gone."""
    with pytest.raises(FileNotFoundError, match="absent"), files.writing(tmp_path / "a"):
        (tmp_path / "absent").read_text()
    assert list(tmp_path.iterdir()) == []


FULL = """
import sys
from pathlib import Path
from snaketron import files, log

def main():
    with files.writing(Path(sys.argv[1]) / "a.bin", Path(sys.argv[1]) / "record.json") as (data, record):
        data.write_bytes(bytes(1_000_000))
        record.write_text("{}")
    return 0

log.run(main)
"""


def test_a_full_file_system_leaves_what_was_there_and_says_which_file_did_not_fit(tmp_path: Path):
    """A real one, of 64 KB in memory, that is mounted in a name space of its own; it holds an older file."""
    mount = 'mount -t tmpfs -o size=64k none "$0" && echo old > "$0/a.bin" && '
    script = mount + '"$@"; status=$?; ls -A "$0"; exit $status'
    space = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, str(tmp_path)]
    tried = subprocess.run([*space, "true"], capture_output=True, text=True)
    if tried.returncode:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no file system to mount: {tried.stderr}")
    program = [sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run([*space, *program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "a.bin\n")  # neither partial files nor a record
    assert f"cannot write {tmp_path}/a.bin: no space left; free some and run" in done.stderr
