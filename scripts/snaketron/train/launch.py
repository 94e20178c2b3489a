"""The supervisor of a training: starts its processes, watches over them, and starts them again.

`python scripts/pretrain.py ...` is the supervisor, in a shell as in a Slurm job. It owns the version
directory and starts the same command once a process, with the environment that torch.distributed expects:
itself where the training has one node, by srun where it has several. It tells them to save and stop when a
signal comes or the job's time limit is near, kills them when they hang, and starts them again where that
may help (`attempts`). The processes say how far they are (`heartbeat`) and why they failed (`FAILURES`).

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from snaketron import secrets, slurm
from snaketron.cluster import layout
from snaketron.config import Cluster
from snaketron.files import read_json, write_json
from snaketron.log import UserError, logger
from snaketron.settings import RunSettings
from snaketron.train import heartbeat, versions
from snaketron.train.attempts import Attempts

SAVED = 75  # exit status of a process that saved and stopped as it was asked to (EX_TEMPFAIL)
STOP = signal.SIGUSR1  # asks for that; unlike SIGTERM and SIGINT, nobody else sends it
FAILURES = "failures"  # directory in which each process that fails says why
POLL_S = 0.2
FAREWELL_S = 3.0  # for the other processes to say why they fail as well, once one has ended
HANDOVER_S = 600.0  # for Slurm to end a job that was requeued or told to go

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
    return given | run.cluster.environment | secrets.read(run.cluster.secrets_file)


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
        """The exit status of all, when all have ended: that of the first one that failed, else 0."""
        statuses = [process.poll() for process in self.processes]
        failed = [status for status in statuses if status]
        if None not in statuses:
            return next((s for s in failed if s != SAVED), failed[0] if failed else 0)
        if any(status != SAVED for status in failed):
            self.failed_at = self.failed_at or time.monotonic()
            if time.monotonic() - self.failed_at > FAREWELL_S:
                self.kill()  # they wait for the one that is gone
        return None

    def stop(self) -> None:
        """Ask all to finish the step, save and end."""
        self._signal(STOP)

    def kill(self) -> None:
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


# ----------------------------------------------------------------------------------------- watching


@dataclass
class Ended:
    """How an attempt ended."""

    why: Literal["exit", "signal", "time limit", "hang"]
    status: int


class Signals:
    """Notes the signals that ask to stop, in order."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.received: list[int] = []

    def __enter__(self) -> Signals:
        self._before = {n: signal.signal(n, lambda n, _: self.received.append(n)) for n in self.NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Limit:
    """The time limit of the Slurm job: asked for at the start, and again when it seems near, as an
    administrator may have moved it."""

    def __init__(self, job: slurm.Job | None, margin: float) -> None:
        self.job, self.margin = job, margin
        self.stop_at = self._ask()
        if self.stop_at is not None and self.stop_at <= time.monotonic():
            raise UserError(
                f"the Slurm job ends within stop_before_limit ({margin:.0f} s): raise its time limit "
                "(`runtime` in the profile, minutes), or lower stop_before_limit to what a checkpoint takes"
            )

    def is_near(self) -> bool:
        if self.stop_at is not None and time.monotonic() >= self.stop_at:
            self.stop_at = self._ask()
            return self.stop_at is not None and time.monotonic() >= self.stop_at
        return False

    def _ask(self) -> float | None:
        left = slurm.seconds_left(self.job) if self.job else None
        return None if left is None else time.monotonic() + left - self.margin


def watch(ranks: Ranks, directory: Path, signals: Signals, limit: Limit, step_timeout: float) -> Ended:
    """Wait until the processes have ended, and have them stop, or be killed, when it is time."""
    why: Literal["exit", "signal", "time limit", "hang"] = "exit"
    heard, last = time.monotonic(), None
    seen = len(signals.received)
    while (status := ranks.poll()) is None:
        time.sleep(POLL_S)
        if len(signals.received) > seen:
            seen = len(signals.received)
            if why == "signal":
                ranks.kill()  # asked twice
            elif why == "exit":
                why = "signal"
                ranks.stop()
        if why == "exit" and limit.is_near():
            why = "time limit"
            ranks.stop()
        if (beat := _changed(directory / heartbeat.FILE)) != last:
            heard, last = time.monotonic(), beat
        if time.monotonic() - heard > step_timeout:
            why, heard = "hang", time.monotonic()
            ranks.kill()
    return Ended(why, status)


def _changed(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


# --------------------------------------------------------------------------------------- supervising


def supervise(
    name: str, directory: Path, run: RunSettings, is_finished: Callable[[], bool], *, attempt: int = 1
) -> int:
    """Run a training to its end, in this job; the exit status.

    Args:
        name: stage, for messages.
        directory: the version that it works in.
        run: how it is run.
        is_finished: whether the version is complete.
        attempt: how often Snakemake has submitted this job. From the second time on, what gave up stays so.

    Raises:
        UserError: the training gave up, or another one owns the version.
    """
    with Signals() as signals:
        job = slurm.current_job()
        status = _supervise(name, directory, run, is_finished, attempt, signals, job)
        if status and job and job.of_rule:
            _wait_to_be_ended(status, signals)
        return status


def _supervise(
    name: str,
    directory: Path,
    run: RunSettings,
    is_finished: Callable[[], bool],
    attempt: int,
    signals: Signals,
    job: slurm.Job | None,
) -> int:
    with versions.own(directory) as owner:
        if is_finished():
            logger.info("%s: these settings were trained before: %s", name, directory)
            return 0
        attempts = Attempts(name, directory, run.max_restarts)
        if attempt > 1 and attempts.gave_up:
            raise UserError(f"{name}: {attempts.gave_up}")
        while True:
            before = versions.latest_iteration(directory) or 0
            limit = Limit(job, run.stop_before_limit)
            shutil.rmtree(directory / FAILURES, ignore_errors=True)
            (directory / heartbeat.FILE).unlink(missing_ok=True)
            attempts.check(before)
            ranks = Ranks([sys.executable, *sys.argv], run, owner, job)
            attempts.begin(before, job.id if job else None)
            ranks.start()
            logger.info("%s: %s, after step %d", name, ranks, before)
            ended = watch(ranks, directory, signals, limit, run.step_timeout)
            if ended.status == 0 and is_finished():
                attempts.end("finished", heartbeat.read(directory).get("iteration", before))
                return 0
            if status := _judge(name, directory, run, ended, attempts, signals, job):
                return status


def _judge(
    name: str,
    directory: Path,
    run: RunSettings,
    ended: Ended,
    attempts: Attempts,
    signals: Signals,
    job: slurm.Job | None,
) -> int:
    """Note how an attempt ended; the exit status of the job, or 0 to start once more."""
    saved = versions.latest_iteration(directory) or 0
    done = max(heartbeat.read(directory).get("iteration", 0), saved)
    if ended.why == "signal" or (ended.why == "exit" and ended.status == SAVED):
        # Slurm may have told the processes alone.
        attempts.end("stopped", done)
        return _stopped(name, signals.received[0] if signals.received else signal.SIGTERM, saved)
    if ended.why == "time limit":
        attempts.end("time limit", done)
        return _hand_over(name, saved, job)
    failure = _first_failure(directory)
    if ended.why == "hang":
        error = f"no step within step_timeout ({run.step_timeout} s)"
    elif failure:
        error = failure["error"]
    else:
        error = f"a process {_ended_with(ended.status)}"
    attempts.end("hung" if ended.why == "hang" else "failed", done, error)
    if failure and failure["traceback"]:
        where = f"{name}: rank {failure['rank']} on {failure['host']}"
        logger.error("%s failed after step %d\n%s", where, done, failure["traceback"].rstrip())
    if failure and failure["by_user"]:
        attempts.give_up(error)
        raise UserError(error)
    logger.warning("%s: %s after step %d; starting again from step %d", name, error, done, saved)
    return 0


def _stopped(name: str, number: int, saved: int) -> int:
    logger.warning(
        "%s: stopped by %s after step %d; run the same command again to continue",
        name,
        signal.Signals(number).name,
        saved,
    )
    return 128 + number


def _hand_over(name: str, saved: int, job: slurm.Job | None) -> int:
    if job and job.of_rule and slurm.requeue(job):
        logger.warning(
            "%s: saved step %d before the time limit; job %s goes on from there", name, saved, job.id
        )
    else:
        logger.warning(
            "%s: saved step %d before the time limit; run the same command again to continue", name, saved
        )
    return SAVED


def _wait_to_be_ended(status: int, signals: Signals) -> None:
    """Let Slurm end the job that it requeues, pre-empts or cancels; the version is let go of by now.

    A pre-empted job that ends by itself counts as failed, and is not requeued.
    """
    before = len(signals.received)
    deadline = time.monotonic() + (HANDOVER_S if status in (SAVED, 128 + signal.SIGTERM) else 0)
    while len(signals.received) == before and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _first_failure(directory: Path) -> dict[str, Any] | None:
    """What the process that failed first said; the others fail because it is gone."""
    said = [read_json(path) for path in (directory / FAILURES).glob("rank_*.json")]
    return min(said, key=lambda failure: failure["time"], default=None)


def _ended_with(status: int) -> str:
    number = -status if status < 0 else status - 128  # of a child, or as srun and the shell say it
    if 0 < number < signal.NSIG:
        hint = " (out of memory?)" if number == signal.SIGKILL else ""
        return f"was killed by {signal.Signals(number).name}{hint}"
    return f"ended with status {status}"
