"""One Snakemake at a time in a directory, which finds its programs and knows how it ended."""

from __future__ import annotations

import getpass
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from snaketron import files
from snaketron.graph import process
from tests.conftest import REPOSITORY, Workspace

import pytest

CODE = """
import pathlib, sys, time
from snaketron.graph import process
print(process.hold(pathlib.Path(sys.argv[1])), flush=True)
time.sleep(float(sys.argv[2]))
"""


def hold(path: Path, seconds: float) -> tuple[subprocess.Popen, str]:
    program = subprocess.Popen(
        [sys.executable, "-c", CODE, str(path), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    with program.stdout as said:
        return program, said.readline().strip()


def test_the_second_process_is_refused_until_the_first_is_killed(tmp_path: Path):
    path = tmp_path / ".snakemake/snaketron.lock"  # of a directory that is not there yet
    first, answer = hold(path, 600)
    assert answer == "True"
    try:
        for place, expected in ((path, "False"), (tmp_path / "elsewhere/lock", "True")):
            second, answer = hold(place, 0)
            assert (answer, second.wait()) == (expected, 0)
    finally:
        first.kill()
        first.wait()
    for _ in range(2):  # and the end of a process frees it
        third, answer = hold(path, 0)
        assert (answer, third.wait()) == ("True", 0)


def test_another_directory_is_told_where_to_run_or_what_to_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(REPOSITORY)
    assert process.elsewhere(REPOSITORY) is None
    monkeypatch.chdir(tmp_path)
    message = process.elsewhere(Path("/a b"))
    assert message and "cd '/a b'. " in message and "ln -s '/a b'/{config,scripts} ." in message
    for name in ("config", "scripts"):
        Path(name).symlink_to(REPOSITORY / name)
    assert process.elsewhere(REPOSITORY) is None


def test_a_package_of_another_clone_is_refused_unless_it_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As after `git pull` in a clone that has no environment of its own."""
    own, other = tmp_path / "scripts/snaketron", tmp_path / "other/snaketron"
    for package in (own, other):
        (package / "graph").mkdir(parents=True)
        (package / "graph/graph.py").write_text("1\n")
    monkeypatch.chdir(tmp_path)
    assert process.mixed(other) is None
    (other / "graph/graph.py").write_text("2\n")
    said = process.mixed(other)
    assert said and said.startswith(f"Snakemake has imported {other}, which differs from {own}, with which")
    own.rename(tmp_path / "moved")
    own.symlink_to("../moved")
    assert process.mixed(tmp_path / "moved") is None


def test_a_directory_without_room_for_notes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a colleague's, in which somebody looks what would run. (To root every place is open.)"""
    monkeypatch.chdir(tmp_path)
    assert process.unwritable() is None
    monkeypatch.setattr(os, "access", lambda place, mode: str(place) != ".snakemake")
    assert process.unwritable() is None
    (tmp_path / ".snakemake").mkdir()
    said = process.unwritable()
    assert said and said.startswith(f"{tmp_path}/.snakemake cannot be written, and Snakemake keeps notes")


def test_a_full_directory_for_temporary_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Snakemake says that no space is left, and not where: on a node that many use it is often this place."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert process.cramped() is None and not [*tmp_path.iterdir()]
    monkeypatch.setattr(files, "no_room", lambda place, size: "no space left" if place == tmp_path else None)
    said = process.cramped()
    assert said and said.startswith(f"{tmp_path}: no space left, and Snakemake writes temporary files there")
    monkeypatch.setenv("TMPDIR", f"{tmp_path}/gone")  # programs then take another one
    assert process.cramped() is None


def test_the_commands_of_rules_find_the_python_of_snakemake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """As `.venv/bin/snakemake` is called: PATH is of a shell that knows nothing of the environment."""
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    for path in ("/usr/bin:/bin", f"{tmp_path}:/bin"):
        monkeypatch.setenv("PATH", path)
        process.find_python()
        assert shutil.which("python") == str(Path(sys.executable).parent / "python")
        assert os.environ["PATH"].endswith(f":{path}")
    found = os.environ["PATH"]
    process.find_python()
    assert os.environ["PATH"] == found  # there already


def test_a_user_without_a_name_is_called_by_number(monkeypatch: pytest.MonkeyPatch):
    """As `docker run --user 54321` starts Snakemake, which ended in a traceback."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    process.name_user()
    assert getpass.getuser() == str(os.getuid())


AT_END = """
import os, signal, sys
from snaketron.graph import process
def explain(): print("one line", file=sys.stderr)
def interrupted(): os.kill(os.getpid(), signal.SIGINT)
process.at_end(explain, interrupted, explain)
"""


def test_ctrl_c_at_the_end_of_a_dry_run_ends_it_without_a_word():
    """Python alone would print a traceback of what it ignores, and end with 0 as if all had been said."""
    done = subprocess.run([sys.executable, "-c", AT_END], capture_output=True, text=True)
    assert (done.stderr, done.returncode) == ("one line\n", -signal.SIGINT)


SNAKEFILE = """
import json, os, signal
from pathlib import Path
from snaketron.graph import process
from snaketron.graph.snakemake import starting

starting.start_whole()

onstart:
    process.obey_interrupts()

onerror:
    Path("ended.json").write_text(json.dumps(process.ending(workflow)))
    process.leave_interrupts()
    os.kill(os.getpid(), signal.SIGINT)

rule fails:
    output: "{corpus}/{shard}.txt"
    shell: "exit 3"

rule stops:
    output: "stopped"
    shell:
        "kill -INT $PPID; "
        "until grep -qs 'Terminating[ ]processes' .snakemake/log/*; do sleep 0.1; done; "
        "kill -INT $PPID; exit 1"
"""


AT_START = """
import os, signal, threading
from pathlib import Path
from snaketron.graph import process
from snaketron.graph.snakemake import starting

if config["whole"]:
    starting.start_whole()

start = threading.Thread.start

def interrupted(thread):
    start(thread)
    if thread.name.startswith("ThreadPoolExecutor"):
        os.kill(os.getpid(), signal.SIGINT)

onstart:
    process.obey_interrupts()
    threading.Thread.start = interrupted

onerror:
    Path("known").write_text(str(Path("ended").exists()))

rule waits:
    shell:
        "until grep -qs 'Terminating[ ]processes' .snakemake/log/*; do sleep 0.1; done; "
        "sleep 1; touch ended"
"""


@pytest.mark.parametrize("whole", [False, True])
def test_ctrl_c_that_comes_while_a_job_is_being_started_is_obeyed_when_it_has_started(
    workspace: Workspace, whole: bool
):
    """Snakemake alone forgets the job: it ends the run before it, in a traceback about its event loop."""
    snakefile = str(workspace.write("toy.smk", AT_START))
    result = workspace.run("snakemake", "-s", snakefile, "--cores", "1", "--config", f"whole={whole}")
    assert result.status == 1 and "Terminating processes on user request" in result.output
    assert ("This event loop is already running" in result.output) == (not whole), result.output
    assert (workspace.path / "known").read_text() == str(whole)


SIGTERM_IN = """
import faulthandler, os, signal
from snakemake.scheduling.job_scheduler import JobScheduler
from snaketron.graph.snakemake import stopping

if config["mended"]:
    stopping.obey_sigterm()

original = getattr(JobScheduler, config["moment"])

def moment(scheduler, *args):
    if scheduler.running or config["moment"] == "update_available_resources":
        faulthandler.dump_traceback_later(300 if config["mended"] else 3, exit=True)
        os.kill(os.getpid(), signal.SIGTERM)
    return original(scheduler, *args)

setattr(JobScheduler, config["moment"], moment)

rule all:
    input: "1", "2"

rule one:
    output: "{number}"
    shell: "touch {output}"
"""


@pytest.mark.parametrize("moment", ["update_available_resources", "_finish_jobs"])
@pytest.mark.parametrize("mended", [False, True])
def test_sigterm_that_comes_while_jobs_are_chosen_or_finished_is_obeyed(
    workspace: Workspace, mended: bool, moment: str
):
    """Snakemake alone hangs in its handler. Else the chosen job ends, and no other begins."""
    snakefile = str(workspace.write("toy.smk", SIGTERM_IN))
    words = ["--cores", "1", "--config", f"mended={mended}", f"moment={moment}"]
    result = workspace.run("snakemake", "-s", snakefile, *words)
    assert result.status == 1
    assert ("Timeout" in result.output and "in exit_gracefully" in result.output) == (not mended)
    assert ("Will exit after finishing currently running jobs" in result.output) == mended
    made = [name for name in "12" if (workspace.path / name).exists()]
    assert len(made) == (mended or moment == "_finish_jobs"), made


def test_how_a_run_ended_is_known_with_its_jobs_that_failed(workspace: Workspace):
    """Ctrl-C is no failure, although it kills a job; pressed again, it is for the jobs, and no traceback."""
    snakefile = str(workspace.write("toy.smk", SNAKEFILE))

    def ending(*targets: str) -> list:
        result = workspace.run("snakemake", "-s", snakefile, "--cores", "1", "-k", *targets)
        assert result.status == 1 and "Traceback" not in result.output, result.output
        return json.loads((workspace.path / "ended.json").read_text())

    assert ending("docs/b.txt", "docs/a.txt") == ["failed", ["fails docs a", "fails docs b"]]
    assert ending("stopped") == ["stopped", []]
