"""What a record says about how its artifact was made: the code, the machine and the cost.

It is for readers alone. Nothing compares it, so it never decides that something is made again.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snaketron.wording import plural

CODE = ("scripts", "rules", "Snakefile")  # what decides on results, of the repository
GIT_TIMEOUT_S = 30  # on a slow file system; the commit is left out then


@functools.cache
def code() -> dict[str, Any]:
    """The commit of the code, and whether nothing in it was changed since; empty outside of a clone."""
    repository = Path(__file__).parents[3]
    if not (repository / ".git").exists():  # installed: the version of the package says which code it is
        return {}
    command = ["git", "status", "--porcelain=v2", "--branch", "--", *CODE]
    try:
        told = subprocess.run(
            command,
            cwd=repository,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=GIT_TIMEOUT_S,
            check=True,
        ).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    head = [line.split()[-1] for line in told if line.startswith("# branch.oid ")]
    changed = [line for line in told if not line.startswith("#")]
    return {"commit": head[0], "clean": not changed} if head else {}


@functools.cache
def hardware() -> dict[str, Any]:
    """The processors that this process may use, the memory of the machine, and its GPUs.

    No name of a machine or a user is in it, since records are sent to W&B where tracking is on.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found: dict[str, Any] = {
        "cpu": _field(Path("/proc/cpuinfo"), "model name"),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory / 1e9, 1),
    }
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    if gpus:
        found |= {"gpu": _field(gpus[0], "Model"), "gpus": len(gpus)}
    return found


def _field(path: Path, name: str) -> str | None:
    """The first value of a name in a file of lines `name: value`."""
    with contextlib.suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return None


def cpu_seconds() -> float:
    """CPU time of this process so far, and of its children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def provenance(more: Mapping[str, Any], cost: Mapping[str, float]) -> dict[str, Any]:
    """What a record says of it; `more` is what else is known of the hardware."""
    return {"code": code(), "hardware": {**hardware(), **more}, "cost": dict(cost)}


# -------------------------------------------------------------------------------------------- in words


def commit(code: Mapping[str, Any]) -> str:
    """The code of a record.

    >>> commit({"commit": "0edb11a495984f0b", "clean": False})
    '0edb11a49598, and changes'
    """
    return str(code["commit"])[:12] + ("" if code.get("clean", True) else ", and changes")


def machine(hardware: Mapping[str, Any]) -> str:
    """The hardware of a record.

    >>> machine({"cpu": "AMD EPYC", "cpus": 2, "memory_gb": 25.2, "gpu": "NVIDIA H200", "gpus": 8})
    'AMD EPYC, 2 CPUs, 25 GB; 8 x NVIDIA H200'
    """
    cpus = plural(hardware.get("cpus") or 0, "CPU")
    said = f"{hardware.get('cpu') or 'unknown'}, {cpus}, {hardware.get('memory_gb') or 0:,.0f} GB"
    return said + (f"; {hardware.get('gpus', 1)} x {hardware['gpu']}" if hardware.get("gpu") else "")
