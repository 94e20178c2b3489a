"""Secrets: read from a private file only, and taken out of logs."""

from __future__ import annotations

import logging
from pathlib import Path

from snaketron import credentials
from snaketron.config import ConfigError, load
from snaketron.log import UserError

import pytest


def write(path: Path, text: str, mode: int = 0o600) -> str:
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return str(path)


def test_names_and_values_are_read(tmp_path: Path):
    path = write(tmp_path / "s", "# W&B\nWANDB_API_KEY=a=b c\n\n HF_TOKEN = hf_x \n")
    assert credentials.read(path) == {"WANDB_API_KEY": "a=b c", "HF_TOKEN": "hf_x"}
    assert credentials.read(None) == {}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644])
def test_a_file_that_others_can_read_is_refused(tmp_path: Path, mode: int):
    path = write(tmp_path / "s", "HF_TOKEN=hf_hidden\n", mode)
    with pytest.raises(
        UserError, match=rf"its mode is {mode:o}, so others can read it; run chmod 600"
    ) as error:
        credentials.read(path)
    assert "hf_hidden" not in str(error.value)


def test_a_line_that_is_no_assignment_is_named_without_its_text(tmp_path: Path):
    with pytest.raises(UserError, match=r"line 2: not NAME=value") as error:
        credentials.read(write(tmp_path / "s", "A=1\nhf_hidden\n"))
    assert "hf_hidden" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"cluster.secrets_file .*/none: no such file or directory"):
        credentials.read(str(tmp_path / "none"))


def test_the_configuration_refuses_secrets():
    with pytest.raises(
        ConfigError, match=r"cluster.environment.WANDB_API_KEY: a secret does not belong in a"
    ):
        load({"cluster": {"environment": {"WANDB_API_KEY": "x", "NCCL_DEBUG": "INFO"}}}, {})
    load({"cluster": {"environment": {"MONKEY": "x", "TOKENIZERS_PARALLELISM": "false"}}}, {})


def test_values_are_taken_out_of_a_log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789")
    monkeypatch.setenv("SOME_PASSWORD", "short")  # too short to be told from other text
    log = logging.getLogger("tests.secrets")
    log.addFilter(credentials.Redact())
    with caplog.at_level(logging.INFO):
        log.info("environment: %s", {"WANDB_API_KEY": "0123456789", "HOME": "/root"})
        log.info("nothing here")
    assert [r.getMessage() for r in caplog.records] == [
        "environment: {'WANDB_API_KEY': '[secret]', 'HOME': '/root'}",
        "nothing here",
    ]
