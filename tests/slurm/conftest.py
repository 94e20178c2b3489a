"""The workflow's own Slurm, for the tests of this directory."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tests.conftest import POLLING, REPOSITORY, Result, Workspace, copy_of, made_once, make_workspace
from tests.end_to_end.processes import Forked
from tests.slurm import cluster

import pytest
import yaml

if TYPE_CHECKING:
    from tests.slurm.disturbed import Disturbed

MINUTES = 10  # time limit of every job
TWO_NODES = ("tests/config/micro.yaml", "tests/slurm/two_nodes.yaml")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")


@dataclass
class Job:
    """A line of squeue."""

    id: int
    state: str
    reason: str  # why it is pending
    restarts: int
    exit_code: int  # or minus the number of a signal
    partition: str
    account: str
    nodes: str  # as `node[1-2]`
    cpus: int
    memory: str
    gres: str  # of each node, as `gres:gpu:2`
    rule: str
    directory: Path


# The columns that these are. Job.rule is the start of the comment, where the executor puts it.
COLUMNS = (
    *("JobID", "State", "Reason", "RestartCnt", "exit_code", "Partition", "Account", "NodeList"),
    *("NumCPUs", "MinMemory", "tres-per-node", "Comment", "WorkDir"),
)


@dataclass
class Running:
    """A Snakemake that has not ended yet, and the file that it writes to."""

    process: subprocess.Popen[bytes] | Forked
    log: Path

    def result(self, seconds: float = 900) -> Result:
        """What it did, once it has ended."""
        status = self.process.wait(timeout=seconds)
        assert status is not None
        return Result(status, self.log.read_text())


@dataclass
class Slurm:
    """A running cluster."""

    path: Path
    process: subprocess.Popen[str]

    def environment(self) -> dict[str, str]:
        """What a process needs to find this cluster."""
        return os.environ | {"PATH": f"{self.path / 'bin'}:{os.environ['PATH']}"}

    def run(self, workspace: Workspace, *targets: str, config: tuple[str, ...] = ()) -> Result:
        """Make `targets` with the profile that ships, as a user of this site would."""
        submitting = Submitting(workspace.path, workspace.overlays)
        return submitting.snakemake(*targets, config=config, environment=self.environment())

    @contextlib.contextmanager
    def start(self, workspace: Workspace, *targets: str, config: tuple[str, ...] = ()) -> Iterator[Running]:
        """Begin to make `targets`, for something to happen meanwhile; at the end nothing of it is left."""
        log = workspace.path / "submitting.log"
        log.write_text("")
        command = Submitting(workspace.path, workspace.overlays).command(*targets, config=config)
        process = Forked(command, workspace.path, log, self.environment())
        try:
            yield Running(process, log)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            self.scancel(*(str(job.id) for job in self.jobs(workspace) if job.state not in ENDED))

    def jobs(self, workspace: Workspace) -> list[Job]:
        """The jobs of a workspace, ended ones too, each once: a requeued job is the same job.

        squeue knows at once what happens, and how often a job was requeued; sacct knows neither.
        """
        columns = ",".join(f"{column}:|" for column in COLUMNS)
        found = []
        for line in self.call("squeue", "--noheader", "--states=all", f"--Format={columns}").splitlines():
            values = ["" if value in ("N/A", "(null)") else value for value in line.split("|")]
            job_id, state, reason, restarts, status, partition, account, nodes, *values = values
            cpus, memory, gres, comment, directory, _ = values
            found.append(
                Job(
                    id=int(job_id),
                    state=state,
                    reason=reason,
                    restarts=int(restarts),
                    exit_code=os.waitstatus_to_exitcode(int(status)),
                    partition=partition,
                    account=account,
                    nodes=nodes,
                    cpus=int(cpus),
                    memory=memory,
                    gres=gres,
                    rule=comment.removeprefix("rule_").split("_wildcards_")[0],
                    directory=Path(directory),
                )
            )
        return [job for job in found if job.directory == workspace.path]

    def accounting(self, *arguments: str, columns: tuple[str, ...]) -> list[dict[str, str]]:
        """Lines of sacct, one for a job and for each of its steps. It hears of events with a delay."""
        said = self.call("sacct", "--parsable2", "--noheader", f"--format={','.join(columns)}", *arguments)
        return [dict(zip(columns, line.split("|"), strict=True)) for line in said.splitlines()]

    def scontrol(self, *arguments: str) -> str:
        return self.call("scontrol", *arguments)

    def scancel(self, *arguments: str) -> None:
        if arguments:
            self.call("scancel", *arguments)

    def call(self, command: str, *arguments: str) -> str:
        """What a command of Slurm prints."""
        done = subprocess.run(
            [command, *arguments], env=self.environment(), capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{command} {' '.join(arguments)}: {done.stdout}{done.stderr}"
        return done.stdout

    def kill_node(self, node: str) -> None:
        """SIGKILL the slurmd of `node`; what its jobs run lives on until Slurm gives them up."""
        self.ask(f"kill {node}")

    def start_node(self, node: str) -> None:
        """Start it again, and wait until the node takes jobs."""
        self.ask(f"start {node}")

    def kill_controller(self) -> None:
        """SIGKILL slurmctld: nobody answers a command, and jobs run on."""
        self.ask("kill slurmctld")

    def stop_controller(self) -> None:
        """End slurmctld: nobody answers a command, and jobs run on.

        One that is killed forgets the jobs of the last seconds. It gives their numbers to others later, and
        drains the nodes where it finds such a number twice.
        """
        self.ask("stop slurmctld")

    def start_controller(self) -> None:
        self.ask("start slurmctld")

    def ask(self, request: str) -> None:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{request}\n")
        self.process.stdin.flush()
        if (said := self.process.stdout.readline()) != "done\n":
            pytest.fail(f"Slurm failed to {request}: {said}{self.process.stdout.read()}")


def wait_for[T](condition: Callable[[], T], seconds: float = 300, every: float = 0.2) -> T:
    """What `condition` returns, as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (reached := condition()):
        assert time.monotonic() < deadline, f"still not so after {seconds} s"
        time.sleep(every)
    return reached


class Submitting(Workspace):
    """A working directory whose jobs go to Slurm."""

    def command(self, *arguments: str, config: tuple[str, ...] = ()) -> list[str]:
        command = [POLLING, "--profile", str(self.profile()), *arguments]
        command += ["--snaketron-slurm-init-seconds-before-status-checks=1"]
        command += ["--max-status-checks-per-second=10"]
        command += ["--configfile", *self.overlays]
        return [*command, "--config", *config] if config else command

    def profile(self) -> Path:
        """The profile that ships, with the names of this site in it and nothing else changed."""
        profile = yaml.safe_load((REPOSITORY / "profiles/slurm/config.yaml").read_text())
        profile["default-resources"] |= {
            "slurm_partition": cluster.PARTITION,
            "slurm_account": cluster.ACCOUNT,
            "runtime": MINUTES,
        }
        for training in ("pretrain", "sft"):
            profile["set-resources"][training] |= {"slurm_partition": cluster.PARTITION, "runtime": MINUTES}
        self.write("site/config.yaml", yaml.safe_dump(profile))
        return self.path / "site"


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """Two idle nodes. Where there can be none, the tests are skipped, or fail in CI."""
    with started(tmp_path_factory.mktemp("slurm")) as found:
        yield found


def give_up(why: str) -> NoReturn:
    """Skip what cannot run here; CI has everything that it needs."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(why)


@contextlib.contextmanager
def started(path: Path, *options: str) -> Iterator[Slurm]:
    """A cluster that lives in `path`."""
    if missing := cluster.not_installed():
        packages = ", ".join(cluster.PACKAGES)
        give_up(f"Slurm is not installed: no {', '.join(missing)} (Debian: {packages})")
    with subprocess.Popen(
        [sys.executable, "-m", "tests.slurm.cluster", str(path), *options],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,  # its end stops the cluster, also when pytest is killed
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout
        if (said := process.stdout.readline()) != "ready\n":
            give_up(f"Slurm does not run here: {said}{process.stdout.read()}")
        yield Slurm(path, process)
        process.terminate()  # a process that a test forked may hold our end of its input open


@pytest.fixture(scope="session")
def two_nodes(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The main job, run once on two nodes from raw text to its end. Tests work on copies."""
    workspace = make_workspace(tmp_path_factory.mktemp("two_nodes") / "work")
    workspace.overlays = TWO_NODES
    result = slurm.run(workspace, "ckpt/sft")
    assert result.status == 0, result.output[-5000:]
    (workspace.path / "transcript.txt").write_text(result.output)
    return workspace


@pytest.fixture(scope="session")
def two_processes(finished: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The main job, its last training done by two processes of this machine, once for all test processes."""

    def make(path: Path) -> Workspace:
        workspace = copy_of(finished, path)
        (path / "transcript.txt").unlink()
        published = path / "ckpt/sft"
        shutil.rmtree(published.resolve())
        published.unlink()
        workspace.overlays = (*TWO_NODES, "tests/slurm/one_node.yaml")
        return workspace

    return Workspace(made_once(tmp_path_factory, "two_processes", make), TWO_NODES)


@pytest.fixture
def disturbed(slurm: Slurm, two_processes: Workspace, tmp_path: Path) -> Disturbed:
    """A copy of the main job whose last training is to be done again, on two nodes."""
    return disturb(slurm, two_processes, tmp_path)


def disturb(slurm: Slurm, two_processes: Workspace, path: Path) -> Disturbed:
    """A copy below `path`, for a training that several stories are about."""
    from tests.slurm.disturbed import Disturbed

    return Disturbed(slurm, copy_of(two_processes, path / "work"))
