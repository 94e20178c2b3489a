"""The owner of a version: one training at a time, until its processes have ended or are taken over."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

from snaketron import files
from snaketron.jobs import owner as owners
from snaketron.jobs.inventory import remove
from snaketron.jobs.owner import TOKEN, check_owner, is_owned, own
from snaketron.jobs.version import Version
from snaketron.log import UserError

import pytest


@pytest.fixture
def owner(tmp_path: Path):
    """Another process that owns tmp_path/version until it is killed."""
    code = (
        "import sys, time, pathlib; from snaketron.jobs.owner import own; "
        "from snaketron.jobs.version import Version; "
        "f = own(Version(pathlib.Path(sys.argv[1]))); print('mine', flush=True); time.sleep(600)"
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


def test_a_version_has_one_owner_until_that_is_killed(tmp_path: Path, owner: subprocess.Popen):
    version = Version(tmp_path / "version")
    with pytest.raises(UserError) as error:
        own(version)
    assert f"{version.directory}: process {owner.pid} on " in str(error.value) and "Slurm job 77" in str(
        error.value
    )
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    with own(version):
        assert files.read_json(version.owner)["process"] == os.getpid()


def test_a_version_in_use_is_not_removed(tmp_path: Path, owner: subprocess.Popen):
    version = Version(tmp_path / "version")
    assert is_owned(version)
    with pytest.raises(UserError, match=f"process {owner.pid}"):
        remove(version, tmp_path)
    assert version.owner.exists()
    owner.kill()
    owner.wait()
    assert not is_owned(version)
    assert remove(version, tmp_path) and not version.directory.exists()


def test_a_child_that_inherits_the_file_owns_the_version_after_its_parent(tmp_path: Path):
    """The lock is that of the open file: it goes when the last process closes it."""
    version = Version(tmp_path / "version")
    with own(version) as mine:
        child = subprocess.Popen(["sleep", "600"], pass_fds=[mine.file.fileno()])
    try:
        with version.lock.open("a") as file:
            assert not files.lock(file)
            child.kill()
            child.wait()
            assert files.lock(file)
    finally:
        child.kill()
        child.wait()


def test_processes_of_a_dead_supervisor_that_stay_on_this_machine_are_killed(tmp_path: Path, monkeypatch):
    """As in NCCL, each waiting for another one: they would keep the memory of their GPUs."""
    monkeypatch.setattr(owners, "PATIENCE_S", 1)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    version = Version(tmp_path / "version")
    with own(version) as first:
        command, file = ["sleep", "600"], first.file.fileno()
        rank = subprocess.Popen(command, pass_fds=[file], env=os.environ | {TOKEN: first.token})
        other = subprocess.Popen(command, env=os.environ | {TOKEN: first.token + "1"})
    try:
        gone = files.read_json(version.owner) | {"process": 2**22 + 1}  # more than there may be
        files.write_json(version.owner, gone)
        with own(version):
            assert rank.wait(timeout=60) == -signal.SIGKILL and other.poll() is None
            with version.lock.open("a") as file:
                assert not files.lock(file)
    finally:
        for process in (rank, other):
            process.kill()
            process.wait()


def test_processes_of_a_dead_supervisor_save_before_they_are_taken_over(tmp_path: Path, monkeypatch):
    """The same command may be run again at once: they were taken over while they finished their step."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    version = Version(tmp_path / "version")
    program = """
import pathlib, sys, time
from snaketron.jobs.owner import check_owner
from snaketron.jobs.version import Version
version = Version(pathlib.Path(sys.argv[1]))
print("steps", flush=True)
time.sleep(2)
check_owner(version)
version.name_latest(7)
"""
    with own(version) as first:
        rank = subprocess.Popen(
            [sys.executable, "-c", program, str(version.directory)],
            stdout=subprocess.PIPE,
            pass_fds=[first.file.fileno()],
            env=os.environ | {TOKEN: first.token},
        )
    assert rank.stdout and rank.stdout.readline() == b"steps\n"
    files.write_json(version.owner, files.read_json(version.owner) | {"process": 2**22 + 1})  # none such
    with own(version) as second:
        assert version.latest.read_text() == "7" and rank.wait(timeout=60) == 0
        assert files.read_json(version.owner)["token"] == second.token
    rank.stdout.close()


def test_a_process_that_was_taken_over_stops_before_it_writes(tmp_path: Path, monkeypatch):
    version = Version(tmp_path)
    monkeypatch.setenv(TOKEN, "mine")
    check_owner(version)  # nobody has written a token yet
    description = {"token": "mine", "process": 1, "host": "node7", "job": None}
    files.write_json(version.owner, description)
    check_owner(version)
    files.write_json(version.owner, description | {"token": "other"})
    with pytest.raises(UserError, match="taken over by process 1 on node7; this training stops"):
        check_owner(version)


def test_a_file_system_without_locks_is_explained(tmp_path: Path, monkeypatch):
    """As Lustre without its mount option."""

    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    said = "this file system has no locks (No locks available); ask for them (Lustre: the mount option flock)"
    with pytest.raises(UserError) as error:
        own(Version(tmp_path))
    assert str(error.value).startswith(f"{tmp_path}/lock: {said}")
    with pytest.raises(UserError) as error:
        files.write_text(tmp_path / "a", "text")
    assert str(error.value).startswith(f"{tmp_path}/.a.partial: {said}")
    assert not files.is_locked(tmp_path / "lock")
