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
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from snaketron import lineage
from snaketron.files import partial, sha256_of
from snaketron.log import UserError

RECORD = "record.json"


def version_key(settings: dict[str, Any], inputs: list[str]) -> str:
    """Hash of the settings that matter and of the inputs' identities, as 12 hexadecimal digits."""
    return sha256_of({"settings": settings, "inputs": inputs})[:12]


def version_directory(output: Path, stage: str, key: str) -> Path:
    """`<ckpt>/versions/<stage>-<key>` for the link `<ckpt>/<stage>`; a `/` in the stage becomes `_`."""
    root = output
    for _ in stage.split("/"):
        root = root.parent
    return root / "versions" / f"{stage.replace('/', '_')}-{key}"


def own(directory: Path) -> TextIO:
    """Own a version until this process ends; `UserError` if another process does.

    The lock is the kernel's, so a killed process does not leave it behind.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = (directory / "owner").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise UserError(
            f"{directory}: {file.read().strip() or 'another process'} is training here (a job that outlived "
            "its Snakemake?); wait until it ends, or stop it, and run the same command again"
        ) from None
    file.truncate(0)
    job = f", Slurm job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    file.write(f"process {os.getpid()} on {platform.node()}{job}\n")
    file.flush()
    return file


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


def publish(directory: Path, output: Path) -> None:
    """Make `output` a link to the finished version, in one step."""
    if output.is_dir() and not output.is_symlink():
        raise UserError(f"{output} is a directory, not a link to a version; move it away and run again")
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
