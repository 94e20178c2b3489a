"""A training of two nodes in an image that a real runtime starts: charliecloud's ch-run, without root."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import subprocess
from pathlib import Path

from tests.slurm.conftest import give_up, wait_for
from tests.slurm.disturbed import Disturbed, state_of
from tests.slurm.image import environment_of_tests, make_image

import psutil
import pytest

SECRETS = {"WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567", "HF_TOKEN": "hf_ThisIsNotARealToken"}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """An image, and what it has to see of this machine; without ch-run it is skipped, or fails in CI."""
    if missing := [command for command in ("ch-run", "dpkg-query") if not shutil.which(command)]:
        give_up(f"no {' and no '.join(missing)} here (Debian: charliecloud-runtime, dpkg)")
    root = tmp_path_factory.mktemp("image") / "root"
    mounts = environment_of_tests(tmp_path_factory.getbasetemp())
    make_image(root, mounts)
    environment = os.environ | {"USER": getpass.getuser()}
    tried = subprocess.run(
        ["ch-run", str(root), "--", "sh", "-c", ":"], env=environment, capture_output=True, text=True
    )
    if tried.returncode:
        give_up(f"ch-run does not run here: {tried.stderr}")
    return root, mounts


def test_a_training_in_an_image_is_that_of_the_machine(
    disturbed: Disturbed, image: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Pre-empted and killed on the way: signals and statuses pass the runtime, and secrets are unseen."""
    root, mounts = image
    secrets, cache = tmp_path / "secrets", tmp_path / "cache"
    cache.mkdir()
    secrets.write_text(f"HF_TOKEN={SECRETS['HF_TOKEN']}\n")
    secrets.chmod(0o600)
    monkeypatch.setenv("WANDB_API_KEY", SECRETS["WANDB_API_KEY"])
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("USER", raising=False)  # as services and CI do; ch-run wants it
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    cluster = (
        f"container: {root}, container_runtime: charliecloud, secrets_file: {secrets}, cache_dir: {cache}"
    )
    config = (f"cluster={{{cluster}, mounts: {mounts}}}", "sft={save_interval: 1000}")
    with disturbed.start(config, "--set-resources", "sft:slurm_partition=low") as running:
        with disturbed.suspended(0, 1, step=3) as ranks:  # so that there is something left to do then
            for rank in ranks:
                inside = rank.environ()
                assert {name: inside[name] for name in SECRETS} == SECRETS
                assert inside["CH_RUNNING"] and inside["PATH"].endswith("/bin:/usr/bin:/bin")
                seen = Path(f"/proc/{rank.pid}/root")
                assert (seen / "ch/environment").samefile(root / "ch/environment")
                assert (seen / str(cache).lstrip("/")).samefile(cache)
                assert inside["TRITON_CACHE_DIR"].startswith(f"{cache}/")
            commands = [
                word for process in psutil.process_iter(["cmdline"]) for word in process.info["cmdline"] or ()
            ]
            assert "--set-env" in commands and not any(
                secret in word for secret in SECRETS.values() for word in commands
            )
            disturbed.pre_empt()
            wait_for(lambda: state_of(ranks[1]) != psutil.STATUS_STOPPED)  # Slurm wakes what it tells to end
        wait_for(lambda: len(disturbed.attempts) == 2 and len(disturbed.ranks()) == 2, 600)
        disturbed.ranks()[0].kill()
        assert running.result().status == 0
    assert disturbed.outcomes == ["stopped", "failed", "finished"]
    assert disturbed.attempts[1]["from_iteration"] >= 3  # saved when it was told
    # srun ends the other process with SIGTERM, and names one of both.
    assert re.search("was killed by SIG(KILL|TERM)", disturbed.attempts[1]["error"])
    assert disturbed.job.state == "COMPLETED" and disturbed.job.restarts == 1
    assert not (root / "work").exists() and not list(disturbed.workspace.path.rglob("*.partial"))
