"""The processes of a training: how its supervisor starts them, and what each does first and last.

Each process is the supervisor's own command again, with the environment that torch.distributed expects. The
supervisor itself starts them where the training has one node, and srun where it has several.

torchrun would kill a process that has not ended 30 s after a signal, and a checkpoint takes longer.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
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
from typing import Any

from snaketron import credentials
from snaketron.files import read_json, write_json
from snaketron.jobs import places, slurm
from snaketron.jobs.containers import containerized, needed
from snaketron.jobs.owner import TOKEN, Owner
from snaketron.log import UserError, first_line, to_be_mended
from snaketron.settings.training import RunSettings
from snaketron.sizes.layout import layout
from snaketron.wording import plural

# Exit status of a process that saved and stopped as it was asked to: that of success, because srun kills the
# processes that are still ending when one of them ends with another status.
SAVED = 0
STOP = signal.SIGUSR1  # asks for that; unlike SIGTERM and SIGINT, nobody else sends it
STOPPED = (SAVED, -STOP, 128 + STOP)  # of who was asked to stop; without anything to save it is killed
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, STOP)  # all that ask a training to save and stop
FAREWELL_S = 3.0  # for the other processes to say why they fail as well, once one has ended
ANSWER_S = 5.0  # for processes that hang to say where they are

OF_SRUN = "TRAINING_OF_SRUN"  # variable of the environment: the job step says which rank a process is


# --------------------------------------------------------------------------------------- the processes


def is_rank() -> bool:
    """Whether a supervisor started this process."""
    return TOKEN in os.environ


def join() -> None:
    """Take the rank from the job step if srun started this process; else have it end with its supervisor.

    A signal kills it from now on, until it trains: Python runs no handler while it waits in NCCL, and what
    there is to keep is on disk.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(places.ASK, signal.SIG_IGN)  # it has nothing to say yet
    if OF_SRUN in os.environ:
        for name, of_slurm in (
            ("RANK", "SLURM_PROCID"),
            ("WORLD_SIZE", "SLURM_NTASKS"),
            ("LOCAL_RANK", "SLURM_LOCALID"),
        ):
            os.environ[name] = os.environ[of_slurm]
    else:
        die_with_parent(signal.SIGTERM)  # save, and let go of the version


def rank() -> int:
    """The number of this process; 0 in the supervisor."""
    return int(os.environ.get("RANK", 0))


def is_writer() -> bool:
    """Whether this process writes metrics and speaks: the last rank, which has the losses."""
    return rank() == int(os.environ.get("WORLD_SIZE", 1)) - 1


def die_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when the one that started it has ended, however it ends."""
    import ctypes

    PR_SET_PDEATHSIG = 1  # prctl(2)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


@contextlib.contextmanager
def telling(failures: Path) -> Iterator[None]:
    """Let the supervisor know why this process fails, or where it hangs, in a file below `failures`.

    A process that fails, leaves (`SystemExit`) or is interrupted ends at once: the interpreter's own exit may
    wait for the other processes for ever.
    """
    places.answer(failures, rank())
    try:
        yield
    except SystemExit as left:
        _end(left.code if isinstance(left.code, int) else 1)
    except KeyboardInterrupt:
        _end(130)
    except Exception as error:
        for_user = to_be_mended(error)
        said = {
            "rank": rank(),
            "host": socket.gethostname(),
            "time": time.time(),
            "by_user": bool(for_user),
            "error": for_user or f"{type(error).__name__}: {first_line(error)}",
            "traceback": "" if for_user else traceback.format_exc(),
        }
        with contextlib.suppress(OSError):  # a full disk; the status says that it failed
            write_json(failures / f"rank_{rank():05d}.json", said)
        _end(1)


def _end(status: int) -> None:
    for child in multiprocessing.active_children():  # they write a checkpoint
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def first_failure(failures: Path) -> dict[str, Any] | None:
    """What the process that failed first said; the others fail because it is gone."""
    said = [read_json(path) for path in failures.glob("rank_*.json")]
    return min(said, key=lambda failure: failure["time"], default=None)


# ----------------------------------------------------------------------------------------- starting


def environment(run: RunSettings) -> dict[str, str]:
    """Variables added for the processes; a default never replaces one that the supervisor has."""
    # $TMPDIR is a path of the host; in an image /tmp is what there is to write to.
    temporary = "/tmp" if run.cluster.container else tempfile.gettempdir()
    cache = Path(run.cluster.cache_dir or temporary) / f"snaketron-{os.getuid()}"
    defaults = needed(run.cluster) | {
        "OMP_NUM_THREADS": str(run.cpus_per_task),
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # local rank 0 is the first GPU that nvidia-smi shows
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # megatron-core's order of communication and computation
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        # On the node's own disk: a parallel file system is slow at thousands of small files with locks.
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
    }
    if not run.cluster.gpus_per_node:
        # A thread that waits for another one spins otherwise. On two cores, beside some ten busy processes,
        # the answers to 40 prompts took 440 s; with this they took 4 s.
        defaults["OMP_WAIT_POLICY"] = "PASSIVE"
    given = {name: value for name, value in defaults.items() if name not in os.environ}
    return given | run.cluster.environment | credentials.read(run.cluster.secrets_file)


class Ranks:
    """The processes of one attempt."""

    def __init__(self, command: list[str], run: RunSettings, owner: Owner, job: slurm.Job | None) -> None:
        self.owner, self.job = owner, job
        self.nodes, self.per_node, _ = layout(run, run.cluster)
        options, command = containerized(command, run.cluster)
        self._check(options)
        shared = self._shared(run)
        self.of_srun = self.nodes > 1 or bool(options)
        if self.of_srun:
            self.command = self._srun(run.cpus_per_task) + options + command
            self.environments = [shared | {OF_SRUN: "1"}]
        else:
            self.command = command
            self.environments = [
                shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.world)}
                for rank in range(self.world)
            ]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.failed: list[int] = []  # statuses of those that failed by themselves, before `kill`
        self.failed_at: float | None = None
        self.killed = False  # by `kill`

    @property
    def world(self) -> int:
        return self.nodes * self.per_node

    def _check(self, options: list[str]) -> None:
        """`UserError` where srun is needed, for several nodes or an image, and cannot be had."""
        if self.nodes > 1 and self.job is None:
            raise UserError(
                f"this training needs {self.nodes} nodes of {self.per_node} processes, and this is no Slurm "
                "job; run it with profiles/slurm, or make cluster.gpus_per_node and the parallel sizes fit"
            )
        if options and self.job is None:
            raise UserError(
                "cluster.container_runtime: pyxis is a part of srun, and this is no Slurm job; run it with "
                "profiles/slurm, or take apptainer or charliecloud"
            )
        if (self.nodes > 1 or options) and not shutil.which("srun"):
            raise UserError(
                "srun: no such command here; if Snakemake runs in an image (--sdm apptainer), take "
                "the trainings out of it and name their image in cluster.container"
            )

    def _shared(self, run: RunSettings) -> dict[str, str]:
        """The part of the environment that all processes have."""
        shared = os.environ | environment(run) | {TOKEN: self.owner.token}
        if self.world > 1:
            # The supervisor is in the batch step of a job, on its first node, and so is rank 0.
            shared["MASTER_ADDR"] = socket.gethostname() if self.nodes > 1 else "127.0.0.1"
            shared["MASTER_PORT"] = str(_free_port())
        return shared

    def _srun(self, cpus_per_task: int) -> list[str]:
        return [
            "srun",
            # All sizes: the executor plugin has removed what Slurm says of the job from the environment.
            f"--nodes={self.nodes}",
            f"--ntasks={self.world}",
            f"--ntasks-per-node={self.per_node}",
            f"--cpus-per-task={cpus_per_task}",
            "--overlap",  # on one node the rule itself is in a step that has all of the job
            "--distribution=block",  # consecutive ranks on a node: tensor parallelism wants NVLink
            "--kill-on-bad-exit=1",
            "--mpi=none",
            "--input=none",
            "--export=ALL",
        ]

    def start(self) -> None:
        for environment in self.environments:
            process = subprocess.Popen(
                self.command,
                env=environment,
                stdin=subprocess.DEVNULL,
                # A killed supervisor's processes own the version until the last of them has ended.
                pass_fds=[self.owner.file.fileno()],
                # Ctrl-C on the terminal reaches the supervisor alone, which tells them once, and they save.
                start_new_session=True,
            )
            self.processes.append(process)

    def __str__(self) -> str:
        where = f", Slurm job {self.job.id}" if self.job else ""
        return f"{plural(self.world, 'process')} on {plural(self.nodes, 'node')}{where}"

    def poll(self) -> int | None:
        """The exit status of the attempt; None while a process runs.

        A process killed by a signal wins: the others fail because it is gone, or wait for it (in NCCL, for
        ever) and are killed here. Then comes any failure, else 0.
        """
        statuses = [process.poll() for process in self.processes]
        failed = [status for status in statuses if status]
        if not self.killed:
            self.failed = failed
        if None not in statuses:
            return min(self.failed or failed, default=0)
        if failed:
            self.failed_at = self.failed_at or time.monotonic()
            if time.monotonic() - self.failed_at > FAREWELL_S:
                self.kill()
        return None

    def stop(self) -> None:
        """Ask all to finish the step, save and end."""
        self._signal(STOP)

    def ask_where(self) -> None:
        """Let the processes say where they are, as far as they can (`places`)."""
        self._signal(places.ASK)
        time.sleep(ANSWER_S)  # and no look before: a network file system would remember what it saw

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
    """A port at which nothing listens, and that the kernel gives to no outgoing connection.

    The first process listens there some seconds later. A port of the kernel's own range, as port 0 gives,
    may be that of any connection of the machine by then.
    """
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="utf-8").split())
    others = [port for port in range(20_000, 65_536) if not low <= port <= high]
    for port in [*random.sample(others, min(100, len(others))), 0]:
        with contextlib.suppress(OSError), socket.create_server(("", port)) as server:
            return int(server.getsockname()[1])
    raise UserError(
        "no port of this machine is free for the processes of a training to meet at; end some programs"
    )
