"""What status.py says where Slurm does not answer, and a run where a file is damaged."""

from __future__ import annotations

from pathlib import Path

import status
from snaketron.jobs.status import report_every
from tests.unit.report.live_run import RunLog

import pytest

# What squeue says where it is installed and nobody configured it.
NOT_CONFIGURED = """\
squeue: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host
squeue: error: fetch_config: DNS SRV lookup failed
squeue: error: _establish_config_source: failed to fetch config
squeue: fatal: Could not establish a configuration source
"""


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (NOT_CONFIGURED, "Could not establish a configuration source"),
        (
            "slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n",
            "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        ),
        ("", "exit status 1"),
    ],
)
def test_where_squeue_fails_its_error_is_a_line_and_the_files_of_the_run_say_the_rest(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    said: str,
    told: str,
):
    (tmp_path / "said").write_text(said)
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\n/bin/cat {tmp_path}/said >&2\nexit 1\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert status.main([]) == 0
    assert caplog.messages == [f"squeue: {told}. The files of the run say:"]
    assert capsys.readouterr().out == "No run of the workflow in this directory yet.\n"


def test_a_local_run_on_a_machine_of_a_cluster_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, caplog
):
    """It said that Slurm has no job, and nothing of the run."""
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    RunLog(tmp_path, {"tokenize_shard": 1}).begins(1, "tokenize_shard", corpus="docs", shard="a")
    with caplog.at_level("INFO", "snaketron"):
        assert status.main([]) == 0
    assert caplog.messages == ["Slurm has no job of this directory. The files of the run say:"]
    assert capsys.readouterr().out.startswith("■ stopped after 00:00:00  0/1 jobs\n")


def test_without_slurm_it_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert status.main([]) == 0
    assert caplog.messages == ["squeue: no such command. The files of the run say:"]
    assert capsys.readouterr().out == "No run of the workflow in this directory yet.\n"


@pytest.mark.parametrize("name", ["progress.json", "owner.json"])
def test_a_damaged_file_of_a_training_is_told_and_the_lines_of_a_run_go_on(tmp_path: Path, name: str):
    version = tmp_path / "ckpt/versions/sft-0123456789ab"
    version.mkdir(parents=True)
    (version / name).write_text("{")
    told: list[str] = []

    def say(text: str) -> None:
        told.append(text)
        raise SystemExit  # ends the thread

    report_every(0.01, tmp_path, tmp_path / "ckpt", say).join(60)
    assert [text.partition(": ")[0] for text in told] == [f"{version}/{name}"]
