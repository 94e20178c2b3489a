"""Whether this machine can train: driver, CUDA, kernels, compiler, communication and disk, said in words.

Each check is a function that gives findings. It imports what it needs itself, because a package that cannot
be imported is one of the things to find.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from snaketron import files
from snaketron.log import UserError
from snaketron.wording import plural

KERNELS = {
    "transformer-engine": "transformer_engine.pytorch",
    "mamba-ssm": "mamba_ssm.ops.triton.ssd_combined",
    "causal-conv1d": "causal_conv1d",
}
DISK_BYTES = 2**28
SLOW_DISK = 100e6  # bytes a second: a checkpoint of 2 billion parameters (30 GB) then takes five minutes
SLOW_LINK = 20e9  # bytes a second between two GPUs: PCIe 4 gives about 20 GB/s, NVLink hundreds
REPEATS = 3  # of an all-reduce whose time is taken


@dataclass(frozen=True)
class Finding:
    """What was tried or looked at, and how it went."""

    name: str
    good: bool
    text: str  # what there is, or what is wrong and what to do


def examine(directory: Path, wanted_gpus: int) -> Iterator[Finding]:
    """All findings about this machine; about GPUs only where some are there or wanted."""
    found = list(local(wanted_gpus))
    yield from found
    if all(finding.good for finding in found) and _gpu_count():
        yield from _communication()
    yield from disk(directory)


def local(wanted_gpus: int) -> Iterator[Finding]:
    """What a node has by itself."""
    yield from _driver(wanted_gpus)
    gpus = list(_torch(wanted_gpus))
    yield from gpus
    if all(finding.good for finding in gpus) and _gpu_count():
        yield from _kernels()
        yield from _compiler()


def _driver(wanted_gpus: int) -> Iterator[Finding]:
    if not shutil.which("nvidia-smi"):
        text = "no nvidia-smi here, so no NVIDIA driver: trainings run on the CPU"
        advice = "; this is not the GPU node, or its driver is not installed" if wanted_gpus else ""
        yield Finding("driver", not wanted_gpus, text + advice)
        return
    fields = "name,memory.total,driver_version"
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=30,
    )
    if done.returncode:
        yield Finding("driver", False, f"nvidia-smi fails: {done.stdout.strip() or done.stderr.strip()}")
        return
    for line in done.stdout.strip().splitlines():
        yield Finding("driver", True, f"GPU {line}")


def _torch(wanted_gpus: int) -> Iterator[Finding]:
    import torch

    there = _gpu_count()
    built = f"torch {torch.__version__}, built for CUDA {torch.version.cuda}"
    if there < wanted_gpus:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        reason = f"CUDA_VISIBLE_DEVICES is {hidden!r}" if hidden is not None else "is the driver too old?"
        yield Finding("CUDA", False, f"{built}, sees {there} of {wanted_gpus} GPUs; {reason}")
        return
    if not there:
        yield Finding("CUDA", True, f"{built}, sees no GPU")
        return
    for i in range(there):
        free, total = torch.cuda.mem_get_info(i)
        major, minor = torch.cuda.get_device_capability(i)
        text = f"GPU {i}: {torch.cuda.get_device_name(i)}, compute capability {major}.{minor}, "
        text += f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        if free < 0.9 * total:
            text += "; another process uses it (nvidia-smi shows which)"
        yield Finding("CUDA", free >= 0.9 * total, text)


def _kernels() -> Iterator[Finding]:
    for package, module in KERNELS.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Transformer Engine warns about an installed JAX
                importlib.import_module(module)
            yield Finding("kernels", True, f"{package} {version(package)}")
        except PackageNotFoundError:
            yield Finding("kernels", True, f"{package}, of no recorded version")
        except Exception as error:
            advice = "uv sync --extra gpu, with the CUDA toolkit, or take the image of envs/"
            yield Finding("kernels", False, f"{package}: {type(error).__name__}: {error}; {advice}")


def _compiler() -> Iterator[Finding]:
    """Triton compiles what starts a kernel, in C, on the machine that computes."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        advice = "install gcc on the nodes that compute, or take the image of envs/"
        yield Finding(
            "compiler", False, f"no gcc and no clang here, and Triton starts kernels by it; {advice}"
        )
        return
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton does
    headers = sysconfig.get_paths(scheme)["include"]
    said = []
    with tempfile.TemporaryDirectory() as directory:
        try:
            done = subprocess.run(
                [compiler, "-x", "c", "-", "-shared", "-fPIC", f"-I{headers}", "-o", f"{directory}/out.so"],
                input="#include <Python.h>\n",
                capture_output=True,
                encoding="utf-8",
                errors="replace",
            )
        except OSError as error:  # CC may be anything
            said = [str(error.strerror)]
        else:
            if done.returncode:
                said = done.stderr.strip().splitlines()[:1] or ["no message"]
    if said:
        advice = f"Triton needs it with this Python's headers in {headers} (python3-dev)"
        yield Finding("compiler", False, f"{compiler} fails: {said[0]}; {advice}")
        return
    yield Finding("compiler", True, f"{compiler}, with Python's headers")


def _communication() -> Iterator[Finding]:
    """An all-reduce among this machine's GPUs by NCCL, in processes of their own that can be killed."""
    import torch

    there = _gpu_count()
    if there < 2:
        yield Finding("NCCL", True, f"{'.'.join(map(str, torch.cuda.nccl.version()))}, nothing to connect")
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(there)]
    try:
        done = subprocess.run(
            [*command, "-m", "snaketron.train.doctor"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=45,
        )
    except subprocess.TimeoutExpired:
        advice = "NCCL_DEBUG=INFO says where it waits; try NCCL_P2P_DISABLE=1"
        yield Finding("NCCL", False, f"{there} GPUs do not answer each other within 45 s; {advice}")
        return
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        yield Finding("NCCL", False, f"an all-reduce fails: {last[0]}; NCCL_DEBUG=INFO says more")
        return
    speed = float(done.stdout.split()[-1])
    text = f"{there} GPUs, all-reduce at {speed / 1e9:.0f} GB/s (bus bandwidth)"
    if speed < SLOW_LINK:
        text += "; that is less than PCIe gives: nvidia-smi topo -m shows how they are linked"
    yield Finding("interconnect", speed >= SLOW_LINK, text)


def disk(directory: Path) -> Iterator[Finding]:
    """Whether checkpoints can be written here, how fast, and whether the file system has locks."""
    path = directory / f".doctor_{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        block, began = os.urandom(2**22), time.monotonic()
        with path.open("wb") as file:
            for _ in range(DISK_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = DISK_BYTES / (time.monotonic() - began)
            files.lock(file)
    except OSError as error:
        yield Finding("disk", False, f"{directory}: {error.strerror}; move pathvars.ckpt to another disk")
        return
    except UserError as error:
        yield Finding("disk", False, str(error))
        return
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    free = shutil.disk_usage(directory).free
    text = f"{directory}: writes {speed / 1e6:,.0f} MB/s, {free / 1e9:,.0f} GB free, has locks"
    if speed < SLOW_DISK:
        text += "; that is slow for checkpoints: move pathvars.ckpt, or raise save_interval"
    yield Finding("disk", speed >= SLOW_DISK, text)


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count()


def report(
    findings: Iterator[Finding], show: Callable[[str], Any] = print, what: str = "This machine"
) -> bool:
    """Show each finding as it comes; whether all are good."""
    bad = 0
    for finding in findings:
        show(f"{'ok     ' if finding.good else 'PROBLEM'}  {finding.name:13} {finding.text}")
        bad += not finding.good
    show(f"{plural(bad, 'problem')}." if bad else f"{what} can train.")
    return not bad


def bus_bandwidth(num_bytes: int, group: Any = None) -> float:
    """Bytes a second that an all-reduce of so many bytes moves over each link, as NCCL's tests count them."""
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    data = torch.ones(max(1, num_bytes // 4), device="cuda" if on_gpu else "cpu")
    ranks = dist.get_world_size(group)
    dist.all_reduce(data, group=group)
    if int(data[0]) != ranks:
        raise RuntimeError(f"an all-reduce of ones over {ranks} processes gave {data[0]}")
    began = time.monotonic()
    for _ in range(REPEATS):
        dist.all_reduce(data, group=group)
    if on_gpu:
        torch.cuda.synchronize()
    # Each byte goes 2 (n - 1) / n times over the bus.
    return REPEATS * data.nbytes * 2 * (ranks - 1) / ranks / (time.monotonic() - began)


def main() -> None:
    """One process of the test of communication: the first prints bytes a second."""
    import torch

    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl")
    speed = bus_bandwidth(2**28)
    if torch.distributed.get_rank() == 0:
        print(speed)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
