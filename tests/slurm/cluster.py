"""A real Slurm on this machine: python -m tests.slurm.cluster DIRECTORY

munged, slurmctld and two slurmd run as the calling user with everything they write in DIRECTORY: no
systemd, no cgroups, nothing in /etc. `ready` is printed when both nodes are idle, else what went wrong.
All is stopped when standard input ends, as it does when the process at its other end is killed.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

DAEMONS = ("munged", "slurmctld", "slurmd")
CLIENTS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo", "sacct", "sacctmgr", "sshare")
NODES = ("node1", "node2")
PARTITION = "tests"
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
SECONDS_TO_START = 30

# CPUs and memory are declared, whatever the machine has. There is no default partition, and none of
# the name in profiles/slurm: a job runs only if it asks for the one that the tests name.
SLURM_CONF = """
ClusterName=tests
SlurmctldHost={host}({address})
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={directory}/munge.socket
# bind to the address of the host name, which is loopback where it resolves so, and not to all
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool.%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
PlugStackConfig={directory}/plugstack.conf
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1
ReturnToService=2
# seconds that squeue shows a finished job: how its end is seen without accounting
MinJobAge=300
PartitionName={partition} Nodes=ALL MaxTime=INFINITE State=UP
"""
NODE_CONF = "NodeName={node} NodeHostname={host} NodeAddr={address} Port={port} CPUs=2 RealMemory=8000\n"


class CannotStart(Exception):
    """Slurm is here and did not come up."""


def find(command: str) -> str | None:
    return shutil.which(command, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def not_installed() -> list[str]:
    return [command for command in (*DAEMONS, *CLIENTS) if not find(command)]


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def configure(directory: Path) -> None:
    """Write all that the daemons read, and clients that find this cluster."""
    host = socket.gethostname().split(".")[0]
    try:
        address = socket.gethostbyname(host)
    except OSError:
        raise CannotStart(f"the host name {host} has no address; add it to /etc/hosts") from None
    controller_port, *ports = free_ports(1 + len(NODES))
    text = SLURM_CONF.format(
        host=host,
        address=address,
        controller_port=controller_port,
        user=pwd.getpwuid(os.getuid()).pw_name,
        directory=directory,
        partition=PARTITION,
    )
    for node, port in zip(NODES, ports, strict=True):
        text += NODE_CONF.format(node=node, host=host, address=address, port=port)
    (directory / "slurm.conf").write_text(text)
    (directory / "plugstack.conf").touch()  # the distribution's names a directory in /etc
    (directory / "state").mkdir()
    key = directory / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    # The executor removes every SLURM_* variable before a rule runs, so the clients say it themselves.
    clients = directory / "bin"
    clients.mkdir()
    for name in CLIENTS:
        script = clients / name
        script.write_text(f'#!/bin/sh\nSLURM_CONF={directory}/slurm.conf exec {find(name)} "$@"\n')
        script.chmod(0o755)


def start(directory: Path) -> None:
    # --force: the socket's directory may be closed to other users, as pytest's are.
    munged = ["--foreground", "--force", f"--socket={directory}/munge.socket"]
    munged += [f"--{kind}-file={directory}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
    daemons = [daemon(directory, "munged", "munged", *munged)]
    wait_for((directory / "munge.socket").exists, daemons, directory)
    daemons.append(daemon(directory, "slurmctld", "slurmctld", "-D"))
    daemons += [daemon(directory, f"slurmd.{node}", "slurmd", "-D", "-N", node) for node in NODES]
    sinfo = [str(directory / "bin/sinfo"), "--noheader", "--Node", "--format=%T"]
    idle = "idle\n" * len(NODES)
    wait_for(lambda: subprocess.run(sinfo, capture_output=True, text=True).stdout == idle, daemons, directory)


def daemon(directory: Path, name: str, command: str, *arguments: str) -> subprocess.Popen[bytes]:
    with (directory / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [find(command) or command, *arguments],
            env=os.environ | {"SLURM_CONF": f"{directory}/slurm.conf"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def wait_for(reached: Callable[[], bool], daemons: list[subprocess.Popen[bytes]], directory: Path) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while not reached():
        if time.monotonic() > deadline or any(one.poll() is not None for one in daemons):
            logs = sorted(directory.glob("*.log"))
            said = "\n".join(f"{log.name}: {log.read_text(errors='replace')[-800:]}" for log in logs)
            raise CannotStart(f"the daemons ended or are not idle after {SECONDS_TO_START} s\n{said}")
        time.sleep(0.1)


def stop() -> None:
    """Kill the daemons and what their jobs left; orphans among them have become our children."""
    while everyone := psutil.Process().children(recursive=True):
        for process in everyone:
            process.kill()
        psutil.wait_procs(everyone, timeout=1)


def main(directory: Path) -> int:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        configure(directory)
        start(directory)
        print("ready", flush=True)
        sys.stdin.read()
    except CannotStart as error:
        print(error, flush=True)
        return 1
    finally:
        stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
