"""The processes of a training: how its supervisor starts them, and what each does first and last.

Each is the supervisor's own command again, with the environment that torch.distributed expects: started by
the supervisor itself where the training has one node, by srun where it has several.

torchrun is not used because it kills what has not ended 30 s after a signal, and a checkpoint takes longer.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from snaketron import credentials
from snaketron.config import Cluster
from snaketron.files import write_json
from snaketron.jobs import slurm
from snaketron.jobs import version as versions
from snaketron.log import UserError
from snaketron.settings.training import RunSettings
from snaketron.sizes.layout import layout

SAVED = 75  # exit status of a process that saved and stopped as it was asked to (EX_TEMPFAIL)
STOP = signal.SIGUSR1  # asks for that; unlike SIGTERM and SIGINT, nobody else sends it
FAILURES = "failures"  # directory in which each process that fails says why
FAREWELL_S = 3.0  # for the other processes to say why they fail as well, once one has ended

OF_SRUN = "TRAINING_OF_SRUN"  # rank and world size are those of the job step


# --------------------------------------------------------------------------------------- the processes


def is_rank() -> bool:
    """Whether a supervisor started this process."""
    return versions.TOKEN in os.environ


def join() -> None:
    """Take the rank from the job step, where srun started this process; end with the supervisor elsewhere."""
    if OF_SRUN in os.environ:
        for ours, theirs in (
            ("RANK", "SLURM_PROCID"),
            ("WORLD_SIZE", "SLURM_NTASKS"),
            ("LOCAL_RANK", "SLURM_LOCALID"),
        ):
            os.environ[ours] = os.environ[theirs]
    else:
        _die_with_parent()


def _die_with_parent() -> None:
    """Have the kernel send SIGTERM when the supervisor is killed: save, and let go of the version."""
    import ctypes

    PR_SET_PDEATHSIG = 1  # prctl(2)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


@contextlib.contextmanager
def telling(directory: Path) -> Iterator[None]:
    """Let the supervisor know why this process fails; it prints what the first one of all said."""
    try:
        yield
    except Exception as error:
        rank = int(os.environ["RANK"])
        by_user = isinstance(error, UserError)
        said = {
            "rank": rank,
            "host": socket.gethostname(),
            "time": time.time(),
            "by_user": by_user,
            "error": str(error) if by_user else f"{type(error).__name__}: {error}",
            "traceback": "" if by_user else traceback.format_exc(),
        }
        with contextlib.suppress(OSError):  # a full disk; the status says that it failed
            write_json(directory / FAILURES / f"rank_{rank:05d}.json", said)
        # Not through the interpreter's exit, which may wait for the other processes for ever.
        for child in multiprocessing.active_children():  # that write a checkpoint
            child.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


# ----------------------------------------------------------------------------------------- starting


def environment(run: RunSettings) -> dict[str, str]:
    """What the processes get beside the supervisor's own environment, which goes first."""
    cache = Path(run.cluster.cache_dir or tempfile.gettempdir()) / f"snaketron-{os.getuid()}"
    defaults = {
        "OMP_NUM_THREADS": str(run.cpus_per_task),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # local rank 0 is the first GPU that nvidia-smi shows
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # megatron-core's order of communication and computation
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TORCH_NCCL_AVOID_RECORD_STREAMS": "1",
        # A disk of the node: thousands of small files, and locks on them, are hard on a parallel file system.
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
    }
    given = {name: value for name, value in defaults.items() if name not in os.environ}
    return given | run.cluster.environment | credentials.read(run.cluster.secrets_file)


def containerized(command: list[str], cluster: Cluster) -> tuple[list[str], list[str]]:
    """Options of srun, and the command, that run `command` in the image of the configuration."""
    if cluster.container is None:
        return [], command
    inside = ["python", *command[1:]]  # the image has a Python of its own
    here = str(Path.cwd())
    mounts = [here, *cluster.mounts]
    if cluster.container_runtime == "pyxis":
        pairs = [m if ":" in m else f"{m}:{m}" for m in mounts]
        return [
            f"--container-image={cluster.container}",
            f"--container-mounts={','.join(pairs)}",
            f"--container-workdir={here}",
        ], inside
    binds = [option for mount in mounts for option in ("--bind", mount)]
    nv = ["--nv"] if cluster.gpus_per_node else []
    return [], ["apptainer", "exec", *nv, *binds, "--pwd", here, cluster.container, *inside]


class Ranks:
    """The processes of one attempt."""

    def __init__(
        self, command: list[str], run: RunSettings, owner: versions.Owner, job: slurm.Job | None
    ) -> None:
        self.layout = nodes, per_node, _ = layout(run, run.cluster)
        self.job = job
        if nodes > 1 and job is None:
            raise UserError(
                f"this training needs {nodes} nodes of {per_node} processes, and this is no Slurm job; run "
                "it with profiles/slurm, or make cluster.gpus_per_node and the parallel sizes fit"
            )
        options, command = containerized(command, run.cluster)
        if options and job is None:
            raise UserError("cluster.container_runtime: pyxis is a part of srun, and this is no Slurm job")
        shared = os.environ | environment(run) | {versions.TOKEN: owner.token}
        if (world := nodes * per_node) > 1:
            # The batch step runs on the first node of the job, and so does rank 0.
            shared["MASTER_ADDR"] = socket.gethostname() if nodes > 1 else "127.0.0.1"
            shared["MASTER_PORT"] = str(_free_port())
        self.of_srun = nodes > 1 or bool(options)
        if self.of_srun:
            if not shutil.which("srun"):
                raise UserError(
                    "srun: no such command here; if Snakemake runs in an image (--sdm apptainer), take "
                    "the trainings out of it and name their image in cluster.container"
                )
            srun = [
                "srun",
                # All of it: the plugin has removed what Slurm says of the job from the environment.
                f"--nodes={nodes}",
                f"--ntasks={world}",
                f"--ntasks-per-node={per_node}",
                f"--cpus-per-task={run.cpus_per_task}",
                "--overlap",  # on one node the rule itself is in a step that has it all
                "--distribution=block",  # consecutive ranks on a node: tensor parallelism wants NVLink
                "--kill-on-bad-exit=1",
                "--mpi=none",
                "--input=none",
                "--export=ALL",
                *options,
            ]
            environments = [shared | {OF_SRUN: "1"}]
            command = srun + command
        else:
            environments = [
                shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                for rank in range(world)
            ]
        self.command, self.environments, self.owner = command, environments, owner
        self.processes: list[subprocess.Popen[bytes]] = []
        self.failed_at: float | None = None
        self.killed = False  # by us

    def start(self) -> None:
        for environment in self.environments:
            process = subprocess.Popen(
                self.command,
                env=environment,
                stdin=subprocess.DEVNULL,
                # The version stays owned until the last process has ended, also when we are killed.
                pass_fds=[self.owner.file.fileno()],
                # Away from the terminal's Ctrl-C: we tell them, once, and they save.
                start_new_session=True,
            )
            self.processes.append(process)

    def __str__(self) -> str:
        where = f", Slurm job {self.job.id}" if self.job else ""
        nodes, per_node, _ = self.layout
        return f"processes: {nodes * per_node}, nodes: {nodes}{where}"

    def poll(self) -> int | None:
        """The exit status of all, when all have ended: of one that died of a signal, as the others fail for
        want of it, else that of the first one that failed, else 0."""
        statuses = [process.poll() for process in self.processes]
        failed = [status for status in statuses if status]
        if None not in statuses:
            died = [] if self.killed else [status for status in failed if status < 0]
            return next((s for s in died + failed if s != SAVED), failed[0] if failed else 0)
        if any(status != SAVED for status in failed):
            self.failed_at = self.failed_at or time.monotonic()
            if time.monotonic() - self.failed_at > FAREWELL_S:
                self.kill()  # they wait for the one that is gone
        return None

    def stop(self) -> None:
        """Ask all to finish the step, save and end."""
        self._signal(STOP)

    def kill(self) -> None:
        self.killed = True
        if self.of_srun and self.job:
            slurm.kill_steps(self.job)
        else:
            self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])
