"""Where a training keeps its state: a directory that Snakemake does not know, and a link to it.

Snakemake deletes a declared output before a job starts and after it fails. So a training works in
`<ckpt>/versions/<stage>-<key>/`, where the key hashes what defines its result: a killed run finds its
checkpoints again, other settings get another directory, and settings that were trained before are found
finished. `<ckpt>/<stage>`, the declared output, is a link to it, made last.
"""

from __future__ import annotations

import fcntl
import os
import platform
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from snaketron.files import partial, read_json, sha256_of, write_json
from snaketron.jobs import slurm
from snaketron.lineage import record as lineage
from snaketron.log import UserError, logger

RECORD = "record.json"
LATEST = "latest_checkpointed_iteration.txt"
OWNER = "owner.json"
TOKEN = "TRAINING_TOKEN"  # variable of the environment of a training's processes: what OWNER must hold
PATIENCE_S = 60  # for the processes of a dead supervisor to save and end
OVER_S = 10  # the same in a job that Slurm has ended, with all that is in reach


def version_key(settings: dict[str, Any], inputs: list[str]) -> str:
    """Hash of the settings that matter and of the inputs' identities, as 12 hexadecimal digits."""
    return sha256_of({"settings": settings, "inputs": inputs})[:12]


def version_directory(output: Path, stage: str, key: str) -> Path:
    """`<ckpt>/versions/<stage>-<key>` for the link `<ckpt>/<stage>`; a `/` in the stage becomes `_`."""
    root = output
    for _ in stage.split("/"):
        root = root.parent
    return root / "versions" / f"{stage.replace('/', '_')}-{key}"


class Owner:
    """A version that this process owns until it, and every process that inherited `file`, has ended."""

    def __init__(self, directory: Path, file: TextIO, token: str) -> None:
        self.directory, self.file, self.token = directory, file, token

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def own(directory: Path) -> Owner:
    """Own a version; `UserError` if another training does.

    The lock is the kernel's, so a killed process does not leave it behind. A holder that Slurm says is over
    (its node was lost, say, and the job runs again elsewhere) or whose supervisor is dead is taken over: the
    new token in OWNER ends its processes at their next write (`check_owner`).
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = (directory / "lock").open("a")
    locked, holder = _lock(file), _holder(directory)
    if not locked and holder and not _is_gone(holder):
        file.close()
        raise UserError(
            f"{directory}: {_describe(holder)} is training here (a job that outlived its Snakemake?); wait "
            "until it ends, or stop it, and run the same command again"
        )
    owner = Owner(directory, file, secrets.token_hex(8))
    write_json(
        directory / OWNER,
        {
            "token": owner.token,
            "process": os.getpid(),
            "host": platform.node(),
            "job": os.environ.get("SLURM_JOB_ID"),
        },
    )
    deadline = time.monotonic() + (PATIENCE_S if locked or not holder or not holder["job"] else OVER_S)
    while not locked and time.monotonic() < deadline:
        time.sleep(0.2)
        locked = _lock(file)
    if not locked:
        logger.warning("%s: an earlier training has not let go of it; it stops at its next write", directory)
    return owner


def check_owner(directory: Path) -> None:
    """Called before a training writes; `UserError` when another one has taken the version over."""
    token = os.environ.get(TOKEN)
    if token and (holder := _holder(directory)) and holder["token"] != token:
        raise UserError(f"{directory}: taken over by {_describe(holder)}; this training stops")


def _lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"{file.name}: this file system has no locks ({error.strerror}); ask for them (Lustre: the mount "
            "option flock), or move `pathvars.ckpt` to one that has"
        ) from None
    return True


def _holder(directory: Path) -> dict[str, Any] | None:
    try:
        return read_json(directory / OWNER)
    except FileNotFoundError:
        return None


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether the supervisor of a training is certainly dead, though some of its processes may not be."""
    if job := holder["job"]:
        # The same job again: Slurm runs it once at a time.
        return job == os.environ.get("SLURM_JOB_ID") or slurm.is_over(job)
    return holder["host"] == platform.node() and not Path(f"/proc/{holder['process']}").exists()


def _describe(holder: dict[str, Any]) -> str:
    job = f", Slurm job {holder['job']}" if holder["job"] else ""
    return f"process {holder['process']} on {holder['host']}{job}"


def iteration_directory(directory: Path, iteration: int) -> Path:
    return directory / f"iter_{iteration:07d}"


def latest_iteration(directory: Path) -> int | None:
    """Steps of the newest complete checkpoint below `directory`; None when there is none.

    That is the one that LATEST names, or, when that was deleted because it could not be read, one before.
    """
    try:
        latest = int((directory / LATEST).read_text())
    except FileNotFoundError:
        return None
    there = [int(path.name.removeprefix("iter_")) for path in directory.glob("iter_*")]
    return max((iteration for iteration in there if iteration <= latest), default=None)


def is_finished(directory: Path) -> bool:
    return (directory / RECORD).exists()


def identity(checkpoint: Path) -> str:
    """What a published checkpoint is, whatever it is called: its stage and version key."""
    try:
        record = lineage.read(checkpoint / RECORD)
    except UserError:
        raise UserError(
            f"{checkpoint}: not a finished checkpoint of this workflow (it has no {RECORD})"
        ) from None
    return f"{record['name']}-{record['key']}"


def remove_partial(directory: Path) -> None:
    """Delete what attempts that were killed left of checkpoints: half-written, or half-deleted."""
    for leftover in directory.glob(f"{partial(directory / 'iter_').name.removesuffix('.partial')}*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)


def publish(directory: Path, output: Path) -> None:
    """Make `output` a link to the finished version, in one step."""
    if output.is_dir() and not output.is_symlink():
        raise UserError(f"{output} is a directory, not a link to a version; move it away and run again")
    remove_partial(directory)
    # Snakemake reads the time of a directory from this file: now, also when the version is an old one.
    (directory / ".snakemake_timestamp").touch()
    link = partial(output)
    link.unlink(missing_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(directory, output.parent), target_is_directory=True)
    link.replace(output)


def unpublished(root: Path) -> Iterator[Path]:
    """Versions below `<root>/versions` that no link below `root` leads to, oldest first."""
    used = {
        path.resolve()
        for path in root.rglob("*")
        if path.is_symlink() and "versions" not in path.relative_to(root).parts
    }
    versions = [v for v in (root / "versions").glob("*") if v.is_dir() and not v.is_symlink()]
    yield from sorted((v for v in versions if v.resolve() not in used), key=lambda v: v.stat().st_mtime)


def remove(directory: Path) -> None:
    """Delete a version; `UserError` when a process is training in it."""
    with own(directory):
        shutil.rmtree(directory)
