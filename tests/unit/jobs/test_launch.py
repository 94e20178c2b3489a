"""What the processes of a training are started with."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

from snaketron.config import load
from snaketron.jobs import launch
from snaketron.jobs.launch import first_failure
from snaketron.settings.training import run_settings

import pytest


def test_the_environment_of_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What the user has set stays, what the configuration says goes over it, secrets come last."""
    secrets = tmp_path / "secrets"
    secrets.write_text("# of the team\nWANDB_API_KEY=abc=def\n\n")
    secrets.chmod(0o600)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "8")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    cluster = {
        "environment": {"NCCL_DEBUG": "INFO", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"},
        "cache_dir": str(tmp_path),
        "secrets_file": str(secrets),
    }
    found = launch.environment(run_settings(load({"cluster": cluster}, {}), "pretrain/broad"))
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in found
    assert found["NCCL_DEBUG"] == "INFO" and found["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"
    assert found["TRITON_CACHE_DIR"] == f"{tmp_path}/snaketron-{os.getuid()}/triton"
    assert found["WANDB_API_KEY"] == "abc=def"


def test_threads_that_wait_leave_the_core_to_others_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    found = [
        launch.environment(run_settings(load({"cluster": {"gpus_per_node": gpus}}, {}), "pretrain/broad"))
        for gpus in (0, 8)
    ]
    assert [of.get("OMP_WAIT_POLICY") for of in found] == ["PASSIVE", None]


def test_in_an_image_caches_lie_in_its_own_tmp_and_charliecloud_has_the_user(monkeypatch: pytest.MonkeyPatch):
    """$TMPDIR is a directory of the host, which the image need not see; cron and CI set no USER."""
    for name in ("TRITON_CACHE_DIR", "USER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", "/local/job7")
    monkeypatch.setattr("tempfile.tempdir", None)
    cluster = {"container": "image", "container_runtime": "charliecloud"}
    found = launch.environment(run_settings(load({"cluster": cluster}, {}), "pretrain/broad"))
    assert found["TRITON_CACHE_DIR"] == f"/tmp/snaketron-{os.getuid()}/triton"
    assert found["USER"]


def test_processes_meet_at_a_port_that_no_connection_is_given(monkeypatch: pytest.MonkeyPatch):
    """One at which somebody listens already is passed over."""
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split())
    taken = launch._free_port()
    assert not low <= taken <= high
    with socket.create_server(("", taken)):
        free = launch._free_port()
        monkeypatch.setattr(random, "sample", lambda *_: [taken, free])
        assert launch._free_port() == free


@pytest.mark.parametrize(
    ("how", "status"),
    [
        ("raise ValueError('NaN\\nand how to search for it')", 1),
        ("sys.exit(75)", 75),
        ("sys.exit('no')", 1),
        ("raise KeyboardInterrupt", 130),
    ],
)
def test_a_process_that_leaves_does_not_wait_for_the_others(tmp_path: Path, how: str, status: int):
    """As the interpreter does at its end, for a thread, and as NCCL does."""
    program = f"""
import sys, threading
from pathlib import Path
from snaketron.jobs.launch import telling
threading.Thread(target=threading.Event().wait).start()
with telling(Path({str(tmp_path)!r})):
    print("what it has to say")
    {how}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (status, "what it has to say\n")
    said = first_failure(tmp_path)
    assert (said and said["error"]) == ("ValueError: NaN" if "NaN" in how else None)


@pytest.mark.parametrize("number", [signal.SIGTERM, launch.STOP])
def test_a_signal_ends_a_process_that_waits_in_a_library(number: signal.Signals):
    """As for others in NCCL. Python's handlers wait until the library returns; here it computes for hours."""
    program = """
import hashlib
from snaketron.jobs import launch
from snaketron.log import run

def main():
    launch.join()
    print("waits", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

run(main)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout and process.stdout.readline() == "waits\n"
            process.send_signal(number)
            assert process.wait(timeout=60) == -number
        finally:
            process.kill()


def test_a_full_disk_is_for_the_user_to_mend_whatever_was_written(tmp_path: Path):
    """It was said so of checkpoints; for a line of metrics, the training was started four times."""
    program = f"""
import errno
from pathlib import Path
from snaketron.jobs.launch import telling
with telling(Path({str(tmp_path)!r})):
    raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 1
    said = first_failure(tmp_path)
    assert said and said["by_user"] and not said["traceback"]
    assert said["error"] == (
        "cannot write metrics.jsonl: no space left; free some and run the same command again"
    )
