"""Who trains in a version: one supervisor and its processes, until they have ended or are taken over.

The kernel's lock on the version's `lock` says whether somebody does. It goes with the last process that has
the file open, so a killed supervisor does not leave it behind, and its processes keep it while they save.
The version's `owner.json` says who, with a token that each process has in its environment: a process that
finds another token there was taken over, and stops before it writes.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from snaketron import files
from snaketron.jobs import slurm
from snaketron.jobs.version import Version
from snaketron.log import UserError, logger

TOKEN = "TRAINING_TOKEN"  # variable of the environment of a training's processes
PATIENCE_S = 300  # for the processes of a dead supervisor to save a large checkpoint, and end
KILLED_S = 30  # for the kernel to end processes, and to free the memory of their GPUs
OVER_S = 10  # the same where Slurm has ended their job, and with it all processes that it can reach


@dataclass(frozen=True)
class Holder:
    """The supervisor that owns a version, as `owner.json` describes it."""

    token: str
    process: int
    host: str
    job: str | None  # its Slurm job

    @classmethod
    def of(cls, version: Version) -> Holder | None:
        """The owner of a version, or the last one; None where nobody has trained yet."""
        try:
            return cls(**files.read_json(version.owner))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            raise UserError(f"{version.owner}: does not say who trains here; delete it") from None

    @property
    def is_gone(self) -> bool:
        """Whether the supervisor is certainly dead; its processes may still live."""
        if self.job:
            # Slurm runs a job once at a time, so an earlier run of this job is over.
            return self.job == os.environ.get("SLURM_JOB_ID") or slurm.is_over(self.job)
        return self.host == platform.node() and not Path(f"/proc/{self.process}").exists()

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.process} on {self.host}{job}"


class Owner:
    """A version that this process owns until it, and every process that inherited `file`, has ended."""

    def __init__(self, file: TextIO, token: str) -> None:
        self.file, self.token = file, token

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def own(version: Version) -> Owner:
    """Own a version; `UserError` if another training does.

    A holder is taken over when its supervisor is dead, or when Slurm says that its job is over: its node was
    lost, say, and the job runs again elsewhere. The new token ends its processes at their next write. Where
    no Slurm has ended them, those that stay are killed: they have the GPUs, where they may wait for each
    other.
    """
    version.directory.mkdir(parents=True, exist_ok=True)
    file = version.lock.open("a", encoding="utf-8")
    locked, holder = files.lock(file), Holder.of(version)
    if not locked and holder is None:
        locked = _wait(file, OVER_S)  # for who has just begun to say who it is
    elif not locked and holder and holder.is_gone:
        logger.info("%s: waiting for the processes of %s to save and end", version.directory, holder)
        locked = _wait(file, OVER_S if holder.job else PATIENCE_S)
        if not locked and not holder.job and _kill_processes(holder.token):
            locked = _wait(file, KILLED_S)
    now = Holder.of(version)
    if not locked and now and (now != holder or not now.is_gone):
        file.close()
        raise UserError(
            f"{version.directory}: {now} is training here (a job that outlived its Snakemake?); wait "
            "until it ends, or stop it, and run the same command again"
        )
    owner = Owner(file, secrets.token_hex(8))
    me = Holder(owner.token, os.getpid(), platform.node(), os.environ.get("SLURM_JOB_ID"))
    files.write_json(version.owner, asdict(me))
    if not locked:
        logger.warning(
            "%s: an earlier training has not let go of it; it stops at its next write", version.directory
        )
    return owner


def _wait(file: TextIO, seconds: float) -> bool:
    """Lock a file as soon as that is free, if it is within so many seconds."""
    deadline = time.monotonic() + seconds
    while not (locked := files.lock(file)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return locked


def _kill_processes(token: str) -> bool:
    """Kill the processes of a training on this machine; whether there were some."""
    found = False
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # of another user, or gone
            if f"{TOKEN}={token}".encode() in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), signal.SIGKILL)
                found = True
    return found


def check_owner(version: Version) -> None:
    """Called before a training writes; `UserError` when another one has taken the version over."""
    token = os.environ.get(TOKEN)
    if token and (holder := Holder.of(version)) and holder.token != token:
        raise UserError(f"{version.directory}: taken over by {holder}; this training stops")


def is_owned(version: Version) -> bool:
    """Whether a process owns a version now."""
    try:
        with version.lock.open(encoding="utf-8") as file:
            return not files.lock(file)
    except FileNotFoundError:
        return False
