"""One Snakemake at a time in a directory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from snaketron.graph import single_run
from tests.conftest import REPOSITORY, Workspace

import pytest

CODE = """
import pathlib, sys, time
from snaketron.graph import single_run
print(single_run.hold(pathlib.Path(sys.argv[1])), flush=True)
time.sleep(float(sys.argv[2]))
"""


def hold(path: Path, seconds: float) -> tuple[subprocess.Popen, str]:
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, str(path), str(seconds)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_the_second_process_is_refused_until_the_first_is_killed(tmp_path: Path):
    path = tmp_path / ".snakemake/snaketron.lock"  # of a directory that is not there yet
    first, answer = hold(path, 600)
    assert answer == "True"
    try:
        second, answer = hold(path, 0)
        assert (answer, second.wait()) == ("False", 0)
    finally:
        first.kill()
        first.wait()
    third, answer = hold(path, 0)
    assert (answer, third.wait()) == ("True", 0)
    fourth, answer = hold(path, 0)  # and the end of a process frees it
    assert (answer, fourth.wait()) == ("True", 0)
    for process in (first, second, third, fourth):
        assert process.stdout is not None
        process.stdout.close()


def test_two_directories_are_two_locks(tmp_path: Path):
    first, answer = hold(tmp_path / "a/lock", 600)
    try:
        second, other = hold(tmp_path / "b/lock", 0)
        assert (answer, other, second.wait()) == ("True", "True", 0)
    finally:
        first.kill()
        first.wait()
    for process in (first, second):
        assert process.stdout is not None
        process.stdout.close()


def test_another_directory_is_told_where_to_run_or_what_to_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(REPOSITORY)
    assert single_run.elsewhere(REPOSITORY) is None
    monkeypatch.chdir(tmp_path)
    message = single_run.elsewhere(Path("/a b"))
    assert message and "cd '/a b'. " in message and "ln -s '/a b'/{config,scripts} ." in message
    for name in ("config", "scripts"):
        Path(name).symlink_to(REPOSITORY / name)
    assert single_run.elsewhere(REPOSITORY) is None


SNAKEFILE = """
import json
from pathlib import Path
from snaketron.graph import single_run

onstart:
    single_run.obey_interrupts()

onerror:
    Path("ended.json").write_text(json.dumps(single_run.ending(workflow)))

rule fails:
    output: "{corpus}/{shard}.txt"
    shell: "exit 3"

rule stops:
    output: "stopped"
    shell:
        "kill -INT $PPID; "
        "until grep -qs 'Terminating[ ]processes' .snakemake/log/*; do sleep 0.1; done; exit 1"
"""


def test_how_a_run_ended_is_known_with_its_jobs_that_failed(workspace: Workspace):
    """Ctrl-C is no failure, although it kills a job."""
    snakefile = str(workspace.write("toy.smk", SNAKEFILE))

    def ending(*targets: str) -> list:
        assert workspace.run("snakemake", "-s", snakefile, "--cores", "1", "-k", *targets).status == 1
        return json.loads((workspace.path / "ended.json").read_text())

    assert ending("docs/b.txt", "docs/a.txt") == ["failed", ["fails docs a", "fails docs b"]]
    assert ending("stopped") == ["stopped", []]
