"""What a command of the user is told, and that nothing depends on it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from snaketron.files import write_json
from snaketron.jobs.version import Version
from snaketron.tracking import notify

import pytest

TELLING = [sys.executable, "-c", "import sys; open(sys.argv[1], 'w').write(sys.stdin.read())"]


@pytest.fixture
def version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Version:
    monkeypatch.chdir(tmp_path)
    version = Version(Path("ckpt/versions/pretrain_broad-0123456789ab"))
    version.directory.mkdir(parents=True)
    write_json(version.heartbeat, {"iteration": 20, "train_iters": 100, "loss": 5.25})
    write_json(version.attempts, [{"outcome": "failed", "error": "no space left"}])
    return version


def test_the_command_gets_facts_as_json_and_its_words_reach_no_shell(version: Version, tmp_path: Path):
    notify.tell_of_workflow([*TELLING, "a; $(b) *"], "failed", Path("ckpt"), ["run.log"], ["evaluate sft"])
    told = json.loads(Path("a; $(b) *").read_text(encoding="utf-8"))
    assert told.pop("seconds") > 0
    assert told == {
        "what": "failed",
        "jobs": ["evaluate sft"],
        "stage": "pretrain/broad",
        "step": 20,
        "steps": 100,
        "loss": 5.25,
        "error": "no space left",
        "directory": str(tmp_path),
        "version": str(version.directory),
        "training_log": str(version.log),
        "log": "run.log",
    }


def test_a_training_of_an_earlier_run_is_not_told_of(version: Version):
    os.utime(version.heartbeat, (1, 1))
    notify.tell_of_workflow([*TELLING, "told"], "finished", Path("ckpt"), ["run.log"])
    assert json.loads(Path("told").read_text(encoding="utf-8")).keys() == {
        "what",
        "directory",
        "log",
        "seconds",
    }


def test_a_run_that_the_user_stopped_has_not_failed(version: Version):
    write_json(version.attempts, [{"outcome": "stopped", "error": None}])
    notify.tell_of_workflow([*TELLING, "told"], "failed", Path("ckpt"), ["run.log"])
    assert json.loads(Path("told").read_text(encoding="utf-8"))["what"] == "stopped"


@pytest.mark.parametrize(
    ("command", "timeout", "said"),
    [
        (["/no/such/command"], 300, "No such file or directory: '/no/such/command'"),
        (["sh", "-c", "exit 3"], 300, "sh ended with status 3"),
        (["sh", "-c", "sleep 1000 & wait"], 1, "sh had not ended after 1 s and was killed"),
    ],
)
def test_a_command_that_fails_or_hangs_is_a_warning(command, timeout, said, monkeypatch, caplog):
    monkeypatch.setattr(notify, "TIMEOUT_S", timeout)
    notify.tell(command, "finished", None)
    assert [record.getMessage().partition(": ")[2][-len(said) :] for record in caplog.records] == [said]
