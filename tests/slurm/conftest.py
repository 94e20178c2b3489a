"""The workflow's own Slurm, for the tests of this directory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPOSITORY, Result, Workspace
from tests.slurm import cluster

import pytest

# What a user changes for a site: the names, and what a job gets.
SITE = (f"slurm_partition={cluster.PARTITION}", "slurm_account=tests", "runtime=5", "mem_mb=1000")


@dataclass
class Job:
    """A line of squeue."""

    state: str
    partition: str
    account: str
    cpus: int
    memory: str
    rule: str
    directory: Path


@dataclass
class Slurm:
    """A running cluster."""

    path: Path

    def run(self, workspace: Workspace, *targets: str) -> Result:
        """Make `targets` with the profile that ships, as a user of this site would."""
        environment = {"PATH": f"{self.path / 'bin'}:{os.environ['PATH']}"}
        if sys.dont_write_bytecode:  # two Snakemakes start in each job, and would compile all they import
            environment |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": f"{self.path}/compiled"}
        return Submitting(workspace.path, workspace.overlays).snakemake(*targets, environment=environment)

    def jobs(self, workspace: Workspace) -> list[Job]:
        """What Slurm knows of the jobs of a workspace. The executor puts the rule in the comment."""
        squeue = [self.path / "bin/squeue", "--noheader", "--states=all", "--format=%T|%P|%a|%C|%m|%k|%Z"]
        lines = subprocess.run(squeue, check=True, capture_output=True, text=True).stdout.splitlines()
        found = []
        for state, partition, account, cpus, memory, comment, directory in (
            line.split("|") for line in lines
        ):
            rule = comment.removeprefix("rule_").split("_wildcards_")[0]
            found.append(Job(state, partition, account, int(cpus), memory, rule, Path(directory)))
        return [job for job in found if job.directory == workspace.path]


class Submitting(Workspace):
    """A working directory whose jobs go to Slurm."""

    def command(self, *arguments: str, config: tuple[str, ...] = ()) -> list[str]:
        snakemake = [sys.executable, str(REPOSITORY / "tests/slurm/poll_often.py")]
        command = [*snakemake, "--profile", "profiles/slurm", *arguments, "--default-resources", *SITE]
        return [*command, "--slurm-init-seconds-before-status-checks", "1", "--configfile", *self.overlays]


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two idle nodes. Where there can be none, the tests are skipped, or fail in CI."""
    give_up = pytest.fail if os.environ.get("CI") else pytest.skip
    if missing := cluster.not_installed():
        give_up(f"Slurm is not installed: no {', '.join(missing)} (Debian: slurm-wlm, munge)")
    path = tmp_path_factory.mktemp("slurm")
    with subprocess.Popen(
        [sys.executable, "-m", "tests.slurm.cluster", str(path)],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,  # its end stops the cluster, also when pytest is killed
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout
        if (said := process.stdout.readline()) != "ready\n":
            give_up(f"Slurm does not run here: {said}{process.stdout.read()}")
        yield Slurm(path)
        process.terminate()  # a process that a test forked may hold our end of its input open


@pytest.fixture(autouse=True)
def outside_of_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget a Slurm job that the tests themselves may run in."""
    for name in os.environ:
        if name.startswith(("SLURM_", "SBATCH_", "SRUN_", "SQUEUE_")):
            monkeypatch.delenv(name)
