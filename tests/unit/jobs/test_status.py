"""What status.py says where Slurm does not answer."""

from __future__ import annotations

from pathlib import Path

import status
from snaketron.log import UserError

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
def test_an_error_of_squeue_is_one_line_that_names_what_works_without_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, told: str
):
    (tmp_path / "said").write_text(said)
    squeue = tmp_path / "squeue"
    squeue.write_text(f"#!/bin/sh\n/bin/cat {tmp_path}/said >&2\nexit 1\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as error:
        status.main([])
    assert str(error.value) == (
        f"squeue: {told}; ask again when Slurm answers, or with --watch, which reads the files of the run"
    )
