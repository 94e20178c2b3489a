"""Secrets reach the processes of a training and nothing that is written down."""

from __future__ import annotations

import contextlib
from pathlib import Path

from tests.slurm.conftest import Slurm
from tests.slurm.disturbed import Disturbed

import pytest

FROM_ENVIRONMENT = "0123456789abcdef0123456789abcdef01234567"
FROM_FILE = "hf_ThisIsNotARealToken"


def holding(root: Path, secret: str) -> list[str]:
    """Files below `root`, of any kind, with the secret in them."""
    found = []
    for path in root.rglob("*"):
        with contextlib.suppress(OSError):
            if path.is_file() and secret.encode() in path.read_bytes():
                found.append(str(path.relative_to(root)))
    return found


def test_secrets_are_in_no_file_and_no_record_of_slurm(
    slurm: Slurm, disturbed: Disturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With W&B offline, and with --verbose, which is passed on to the job."""
    secrets = tmp_path / "secrets"
    secrets.write_text(f"HF_TOKEN={FROM_FILE}\n")
    secrets.chmod(0o600)
    monkeypatch.setenv("WANDB_API_KEY", FROM_ENVIRONMENT)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    config = (f"cluster={{secrets_file: {secrets}}}", "tracking=offline")
    with disturbed.start(config, "--verbose") as running:
        with disturbed.suspended(0, 1, step=1) as ranks:
            environments = [rank.environ() for rank in ranks]
        result = running.result()
    assert result.status == 0
    assert [(e["WANDB_API_KEY"], e["HF_TOKEN"]) for e in environments] == [(FROM_ENVIRONMENT, FROM_FILE)] * 2
    job = disturbed.job.id
    (log,) = (disturbed.workspace.path / "logs/slurm/rule_sft").glob(f"{job}.log")
    assert "Handle temp files for job sft" in log.read_text()  # what --verbose adds
    assert list((disturbed.workspace.path / "wandb").glob("offline-run-*"))
    said = [slurm.scontrol("show", "job", str(job)), slurm.call("sacct", f"-j{job}", "--batch-script")]
    said += [slurm.scontrol("write", "batch_script", str(job), "-"), result.output]
    for secret in (FROM_ENVIRONMENT, FROM_FILE):
        assert holding(disturbed.workspace.path, secret) == []
        assert not any(secret in text for text in said)
    # What the environment held, Slurm keeps where it is asked to; what the file holds, it never sees.
    assert FROM_FILE not in slurm.call("sacct", f"-j{job}", "--env-vars")
