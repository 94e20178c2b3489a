"""Whether the nodes of an allocation can train together: `srun python scripts/doctor.py`, one process a GPU.

The first rank writes its address into the directory of the checkpoints, which all nodes must see, gathers
what the others found, and reports.
"""

from __future__ import annotations

import itertools
import os
import socket
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from snaketron.files import writing
from snaketron.log import first_line
from snaketron.train.doctor import KERNELS, Finding, bus_bandwidth, disk, local

PACKAGES = ("torch", "megatron-core", *KERNELS)
WAIT_S = 120  # for the other nodes to start their processes


class Rank(NamedTuple):
    """A process of the job step."""

    number: int
    world: int
    local: int
    node: str
    step: str  # the job and its step


class Seen(NamedTuple):
    """What a process found on its node."""

    node: str
    facts: dict[str, str]  # that must be the same everywhere
    problems: list[Finding]


def rank() -> Rank | None:
    """The place of this process in its job step; None where srun did not start several."""
    if int(os.environ.get("SLURM_NTASKS", 1)) < 2 or "SLURM_PROCID" not in os.environ:
        return None
    number, world, near = (int(os.environ[f"SLURM_{name}"]) for name in ("PROCID", "NTASKS", "LOCALID"))
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    step = "_".join(os.environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID"))
    return Rank(number, world, near, node, step)


def examine(here: Rank, directory: Path, wanted_gpus: int) -> Iterator[Finding]:
    """What the first process reports; the others take part and find nothing.

    Args:
        wanted_gpus: GPUs that each node must have.
    """
    import torch.distributed as dist

    seen = _look(here, wanted_gpus)
    try:
        _join(here, directory)
    except (OSError, RuntimeError) as error:
        yield Finding("network", False, f"{here.node}, rank {here.number}: {error}")
        return
    try:
        everything: list[Any] = [None] * here.world
        dist.all_gather_object(everything, seen)
        speeds = _speeds(here, [found.node for found in everything])
        if here.number == 0:
            yield from compare(everything)
            yield from judge(speeds)
            yield from disk(directory)
    finally:
        dist.destroy_process_group()


def _look(here: Rank, wanted_gpus: int) -> Seen:
    """The first process of a node examines it; each says what it is made of."""
    import torch

    facts = {package: _version(package) for package in PACKAGES}
    problems = [] if here.local else [finding for finding in local(wanted_gpus) if not finding.good]
    if torch.cuda.is_available():
        torch.cuda.set_device(here.local % torch.cuda.device_count())
        facts |= {"GPU": torch.cuda.get_device_name(), "GPUs": str(torch.cuda.device_count())}
        facts["driver's CUDA"] = str(torch.version.cuda)
    return Seen(here.node, facts, problems)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _join(here: Rank, directory: Path) -> None:
    """Join the other processes. Raises `OSError` or `RuntimeError` with what to do."""
    import torch
    import torch.distributed as dist

    meeting = directory / f".doctor_{here.step}"
    if here.number == 0:
        directory.mkdir(parents=True, exist_ok=True)
        store = dist.TCPStore(socket.gethostname(), 0, here.world, True, timedelta(seconds=WAIT_S), False)
        with writing(meeting) as [partial]:
            partial.write_text(f"{socket.gethostname()} {store.port}", encoding="utf-8")
    else:
        host, port = _address(meeting, here)
        store = dist.TCPStore(host, port, here.world, False, timedelta(seconds=WAIT_S), False)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(
            backend, store=store, rank=here.number, world_size=here.world, timeout=timedelta(seconds=WAIT_S)
        )
        bus_bandwidth(1)
    except RuntimeError as error:
        raise RuntimeError(
            f"{backend} does not connect the nodes: {first_line(error)}; NCCL_DEBUG=INFO says where it "
            "waits, and NCCL_SOCKET_IFNAME, in cluster.environment for trainings, names the interface"
        ) from None
    finally:
        if here.number == 0:
            meeting.unlink(missing_ok=True)


def _address(meeting: Path, here: Rank) -> tuple[str, int]:
    """Where the first process waits, once its file can be seen here."""
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        try:
            host, port = meeting.read_text(encoding="utf-8").split()
            return host, int(port)
        except FileNotFoundError:
            time.sleep(0.2)
    raise OSError(
        f"{meeting.parent} on {here.node} is not what the first node sees: trainings on several nodes need a "
        "shared directory; run in one, or move pathvars.ckpt"
    )


def _speeds(here: Rank, nodes: Sequence[str]) -> dict[str, float]:
    """Bus bandwidths of an all-reduce, of each GPU: over all, within a node, and over each two neighbours."""
    import torch
    import torch.distributed as dist

    num_bytes = 2**28 if torch.cuda.is_available() else 2**23
    names = list(dict.fromkeys(nodes))
    sets: dict[str, list[str]] = {"all": names}
    if len(names) > 2:
        sets |= {f"{one} and {other}": [one, other] for one, other in itertools.pairwise(names)}
    if len(names) > 1 and nodes.count(names[0]) > 1:
        sets |= {name: [name] for name in names}
    found = {}
    for name, members in sets.items():
        ranks = [i for i, node in enumerate(nodes) if node in members]
        group = dist.new_group(ranks)
        if here.number in ranks:
            found[name] = bus_bandwidth(num_bytes, group)
        dist.barrier()
    everything: list[Any] = [None] * here.world
    dist.all_gather_object(everything, found)
    return {name: min(one[name] for one in everything if name in one) for name in sets}


def compare(seen: Sequence[Seen]) -> Iterator[Finding]:
    """Problems of each node, and packages or GPUs that are not the same on all."""
    nodes = Counter(found.node for found in seen)
    counts = ", ".join(f"{node} {count}" for node, count in nodes.items())
    even = len(set(nodes.values())) == 1
    text = f"{len(seen)} processes on {len(nodes)} nodes ({counts})"
    yield Finding("nodes", even, text + ("" if even else "; trainings have as many on each node"))
    for found in seen:
        for finding in found.problems:
            yield Finding(finding.name, False, f"{found.node}: {finding.text}")
    same = True
    for fact in seen[0].facts | seen[-1].facts:
        values: dict[str, set[str]] = {}
        for found in seen:
            values.setdefault(found.facts.get(fact, "none"), set()).add(found.node)
        if len(values) > 1:
            same = False
            differ = "; ".join(f"{value} on {', '.join(sorted(on))}" for value, on in values.items())
            yield Finding("nodes", False, f"{fact} is not the same everywhere: {differ}")
    if same:
        facts = ", ".join(f"{name} {value}" for name, value in seen[0].facts.items() if value != "none")
        yield Finding("packages", True, f"the same on all nodes: {facts}")


def judge(speeds: Mapping[str, float]) -> Iterator[Finding]:
    """The speed over all nodes, and the nodes and neighbours that are half as fast as the others, or slower.

    Args:
        speeds: bus bandwidths in bytes a second: of "all", of "NODE" and of "NODE and NODE".
    """
    text = f"all-reduce over all at {speeds['all'] / 1e9:.1f} GB/s (bus bandwidth)"
    for what, between in (("within a node", False), ("between two nodes", True)):
        kind = {n: speed for n, speed in speeds.items() if n != "all" and (" and " in n) == between}
        if not kind:
            continue
        usual = statistics.median(kind.values())
        text += f"; {what} {usual / 1e9:.1f} GB/s"
        for name, speed in kind.items():
            if speed < usual / 2:
                slow = f"{name}: {speed / 1e9:.1f} GB/s, where {usual / 1e9:.1f} are usual {what}"
                yield Finding("network", False, f"{slow}; leave the node out (--exclude) and tell the site")
    yield Finding("network", True, text)
