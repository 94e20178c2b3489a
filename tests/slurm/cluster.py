"""A real Slurm on this machine: python -m tests.slurm.cluster DIRECTORY [plain]

munged, MariaDB, slurmdbd, slurmctld and two slurmd run as the calling user with everything they write in
DIRECTORY: no systemd, no cgroups, nothing in /etc. A `plain` cluster has neither MariaDB nor slurmdbd, so no
accounting, and forgets a job 10 s after its end. `ready` is printed when both nodes are idle, else what went
wrong. Then each line of standard input is a request, answered by `done` or what went wrong:

    kill node2     the node loses its slurmd by SIGKILL; what its jobs run lives on
    start node2    and gets it back, which is done when the node takes jobs again
    kill slurmctld, start slurmctld     the same of the controller; nodes and jobs go on meanwhile
    stop slurmctld     it ends by SIGTERM, after it has written down which jobs it has

All is stopped when standard input ends, as it does when the process at its other end is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pwd
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import psutil

DAEMONS = ("munged", "mariadbd", "mariadb-install-db", "slurmdbd", "slurmctld", "slurmd")
CLIENTS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo", "sacct", "sacctmgr", "sshare")
PACKAGES = ("slurm-wlm", "slurmdbd", "mariadb-server", "munge")  # Debian's
NODES = ("node1", "node2")
CPUS = 8  # of a node, as are these
MEMORY = 16_000  # MB
GPUS = 2
PARTITION = "tests"
ACCOUNT = "tests"
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
SECONDS_TO_WAIT = 180

# CPUs, memory and GPUs are declared, whatever the machine has. There is no default partition, and none of
# the name in profiles/slurm: a job runs only if it asks for the one that the tests name.
SLURM_CONF = """
ClusterName=tests
SlurmctldHost={host}({address})
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
# a requeued job waits until its credential has expired: 120 s if not said
AuthInfo=socket={directory}/munge.socket,cred_expire=5
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
DefMemPerCPU=1000
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
# A node without its slurmd is DOWN after the first, and a message to it lost after the second: about 20 s
# together. Then its jobs are requeued. It may come back.
SlurmdTimeout=10
MessageTimeout=5
JobRequeue=1
ReturnToService=2
# seconds from SIGTERM to SIGKILL
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName={partition} Nodes=ALL MaxTime=INFINITE PriorityTier=5 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=15
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=9 PreemptMode=OFF
"""
# MinJobAge: seconds that squeue shows a finished job.
ACCOUNTING_CONF = """
MinJobAge=3600
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={address}
AccountingStoragePort={accounting_port}
AccountingStoragePass={directory}/munge.socket
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_comment,job_env,job_script
"""
PLAIN_CONF = """
MinJobAge=10
AccountingStorageType=accounting_storage/none
"""
NODE_CONF = (
    "NodeName={node} NodeHostname={host} NodeAddr={address} Port={port} "
    f"CPUs={CPUS} RealMemory={MEMORY} Gres=gpu:{GPUS}\n"
)
# The database knows the calling user by its socket: there is no password.
SLURMDBD_CONF = """
AuthInfo=socket={directory}/munge.socket
DbdHost={host}
DbdAddr={address}
DbdPort={accounting_port}
CommunicationParameters=NoInAddrAny
SlurmUser={user}
PidFile={directory}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser={user}
StorageLoc=slurm
"""


class Failed(Exception):
    """Slurm is here and did not do what it should."""


def find(command: str) -> str | None:
    return shutil.which(command, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def not_installed() -> list[str]:
    return [command for command in (*DAEMONS, *CLIENTS) if not find(command)]


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, below those that the kernel usually gives to outgoing connections."""
    found: set[int] = set()
    while len(found) < count:
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("", port))
            found.add(port)
    return list(found)


def configure(directory: Path, *, accounting: bool) -> None:
    """Write all that the daemons read, and clients that find this cluster."""
    host = socket.gethostname().split(".")[0]
    try:
        address = socket.gethostbyname(host)
    except OSError:
        raise Failed(f"the host name {host} has no address; add it to /etc/hosts") from None
    controller_port, accounting_port, *ports = free_ports(2 + len(NODES))
    names = {
        "host": host,
        "address": address,
        "controller_port": controller_port,
        "accounting_port": accounting_port,
        "user": user(),
        "directory": directory,
        "partition": PARTITION,
    }
    text = (SLURM_CONF + (ACCOUNTING_CONF if accounting else PLAIN_CONF)).format(**names)
    for node, port in zip(NODES, ports, strict=True):
        text += NODE_CONF.format(node=node, host=host, address=address, port=port)
    (directory / "slurm.conf").write_text(text)
    (directory / "plugstack.conf").touch()  # the distribution's names a directory in /etc
    (directory / "state").mkdir()
    # A GPU is a character device to Slurm, and one of its own.
    for number in range(GPUS):
        (directory / f"gpu{number}").symlink_to("/dev/null")
    (directory / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={directory}/gpu[0-{GPUS - 1}]\n")
    write_private(directory / "slurmdbd.conf", SLURMDBD_CONF.format(**names).encode())
    write_private(directory / "munge.key", secrets.token_bytes(128))
    # The executor removes every SLURM_* variable before a rule runs, so the clients say it themselves.
    clients = directory / "bin"
    clients.mkdir()
    for name in CLIENTS:
        script = clients / name
        script.write_text(f'#!/bin/sh\nSLURM_CONF={directory}/slurm.conf exec {find(name)} "$@"\n')
        script.chmod(0o755)


def user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def write_private(path: Path, content: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(content)


@dataclass
class Cluster:
    """The daemons that run in a directory which is configured."""

    directory: Path
    accounting: bool
    daemons: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    def start(self) -> None:
        # --force: the socket's directory may be closed to other users, as pytest's are.
        munged = ["--foreground", "--force", f"--socket={self.directory}/munge.socket"]
        munged += [f"--{kind}-file={self.directory}/munge.{kind}" for kind in ("key", "pid", "log", "seed")]
        self.daemon("munged", "munged", *munged)
        if self.accounting:
            self.start_accounting()
        else:
            self.wait_for((self.directory / "munge.socket").exists)
        self.daemon("slurmctld", "slurmctld", "-D")
        for node in NODES:
            self.daemon(node, "slurmd", "-D", "-N", node)
        self.wait_for(lambda: all(self.state(node) == "idle" for node in NODES))

    def start_accounting(self) -> None:
        database = ["--no-defaults", f"--user={user()}", f"--datadir={self.directory}/database"]
        database += ["--innodb-log-file-size=8M"]  # it is written whole: 100 MB if not said
        # Of its own: installations beside each other in one directory dropped each other's temporary tables.
        scratch = self.directory / "database_scratch"
        scratch.mkdir()
        database += [f"--tmpdir={scratch}"]
        self.run("mariadb-install-db", *database, "--skip-test-db")
        self.daemon(
            "mariadbd", "mariadbd", *database, "--skip-networking", f"--socket={self.database_socket}"
        )
        self.wait_for(lambda: self.database_socket.exists() and (self.directory / "munge.socket").exists())
        self.daemon("slurmdbd", "slurmdbd", "-D")
        self.wait_for(lambda: not self.run("sacctmgr", "show", "cluster", check=False).returncode)
        for what in (["cluster", "tests"], ["account", ACCOUNT], ["user", user(), f"account={ACCOUNT}"]):
            self.run("sacctmgr", "--immediate", "add", *what)

    def obey(self, request: str) -> None:
        match request.split():
            case ["start", "slurmctld"] if "slurmctld" not in self.daemons:
                self.daemon("slurmctld", "slurmctld", "-D")
                self.wait_for(lambda: self.run("scontrol", "ping", check=False).returncode == 0)
            case ["kill", name] if name in (*NODES, "slurmctld") and name in self.daemons:
                process = self.daemons.pop(name)
                process.kill()
                process.wait()
            case ["stop", "slurmctld"] if "slurmctld" in self.daemons:
                process = self.daemons.pop("slurmctld")
                process.terminate()
                process.wait(SECONDS_TO_WAIT)
            case ["start", node] if node in NODES and node not in self.daemons:
                # What a requeued job left here is killed when slurmd registers. The same job, if sent before
                # this is over, would fail ("Job credential revoked") or could not be killed any more.
                self.run("scontrol", "update", f"node={node}", "state=drain", "reason=starting")
                now = datetime.now().replace(microsecond=0)
                self.daemon(node, "slurmd", "-D", "-N", node)
                self.wait_for(lambda: self.registered(node) >= now and not self.left_behind(node))
                time.sleep(1)  # the resolution of a revocation
                self.run("scontrol", "update", f"node={node}", "state=resume")
                self.wait_for(lambda: self.state(node).isalpha() and self.state(node) != "down")
            case _:
                raise Failed(f"cannot {request}")

    def state(self, node: str) -> str:
        """The state of a node in sinfo's words, such as `idle`, `mixed` or `down*`."""
        sinfo = ["sinfo", f"--nodes={node}", f"--partition={PARTITION}", "--noheader", "--format=%T"]
        return self.run(*sinfo, check=False).stdout.strip()

    def registered(self, node: str) -> datetime:
        """When the daemon started that the controller knows of."""
        said = self.run("scontrol", "show", "node", node).stdout
        found = re.search(r"SlurmdStartTime=(\d\S+)", said)
        return datetime.fromisoformat(found[1]) if found else datetime.min

    def left_behind(self, node: str) -> set[str]:
        """Jobs with a step on the node that should not run there. A step listens at `node1_7.0`."""
        squeue = ["squeue", "--noheader", f"--nodelist={node}", "--states=running", "--format=%A"]
        steps = f"{self.directory}/spool.{node}/{node}_"
        sockets = [str(one.laddr) for one in psutil.net_connections("unix")]
        jobs = {path.removeprefix(steps).split(".")[0] for path in sockets if path.startswith(steps)}
        return jobs - set(self.run(*squeue).stdout.split())

    @property
    def database_socket(self) -> Path:
        return self.directory / "database.socket"

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {
            "SLURM_CONF": f"{self.directory}/slurm.conf",
            "MYSQL_UNIX_PORT": str(self.database_socket),  # slurmdbd has no option for it
        }

    def daemon(self, name: str, command: str, *arguments: str) -> None:
        with (self.directory / f"{name}.log").open("a") as log:
            self.daemons[name] = subprocess.Popen(
                [find(command) or command, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def run(self, command: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [find(command) or command, *arguments], env=self.environment, capture_output=True, text=True
        )
        if check and done.returncode:
            raise Failed(f"{command} {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done

    def wait_for(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS_TO_WAIT
        while not reached():
            ended = [name for name, process in self.daemons.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = sorted(self.directory.glob("*.log"))
                said = "\n".join(f"{log.name}: {log.read_text(errors='replace')[-800:]}" for log in logs)
                why = f"{', '.join(ended)} ended" if ended else f"not reached in {SECONDS_TO_WAIT} s"
                raise Failed(f"{why}\n{said}")
            time.sleep(0.05)

    def requests(self) -> Iterator[str]:
        """The lines of standard input. Meanwhile orphans of the daemons, our children, leave no zombies."""
        while True:
            if select.select([sys.stdin], [], [], 1)[0]:
                if not (line := sys.stdin.readline()):
                    return
                yield line.strip()
            daemons = {process.pid for process in self.daemons.values()}
            for child in psutil.Process().children():
                if child.pid not in daemons:
                    os.waitpid(child.pid, os.WNOHANG)


def stop() -> None:
    """Kill the daemons and what their jobs left; orphans among them have become our children."""
    while everyone := psutil.Process().children(recursive=True):
        for process in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(everyone, timeout=1)


def main(directory: Path, *, accounting: bool) -> int:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    cluster = Cluster(directory, accounting)
    try:
        configure(directory, accounting=accounting)
        cluster.start()
        print("ready", flush=True)
        for request in cluster.requests():
            cluster.obey(request)
            print("done", flush=True)
    except Failed as error:
        print(error, flush=True)
        return 1
    finally:
        stop()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), accounting="plain" not in sys.argv[2:]))
