"""Processes that have imported what takes long, and fork for each run.

Starting `snakemake` costs 1.4 s of CPU and a dry-run after that 0.2 s, and the tests run it some 300 times.
Importing torch and megatron-core costs 3 to 5 s, and the tests would do so another 60 times, beside the
processes that supervisors start. What runs is the program itself, in a process of its own with the directory
and the environment that it is given. Processes of pytest begin so, too: what the tests import takes 7 s.

The program below is `python tests/warm.py KIND SOCKET ...`, with the number of a socket that listens. It
imports when the first connection comes, and has a process for each connection. That one reads each run as its
length and JSON (`arguments`, `directory` and `environments`, one for each process), and the files that come
with it are standard input, output and error. It answers with the numbers of the processes and, at the end,
their exit statuses. The program ends when its standard input and its connections have ended.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from types import ModuleType
from typing import IO, Any

# What is imported before the first run: what every run would import.
IMPORTED = {
    "snakemake": (
        *("snakemake.cli", "docutils.core", "dpath", "jinja2", "PIL.Image", "pygments.lexers", "requests"),
        *("snakemake.storage", "smart_open", "snaketron.config", "snaketron.graph.graph"),
        *("snaketron.graph.requests", "snaketron.graph.dry_run", "snaketron.graph.submission"),
    ),
    "megatron": (
        *("snaketron.model", "snaketron.train.build", "snaketron.train.loop", "snaketron.train.merge"),
        *("snaketron.inference.tuning", "snaketron.train.batches", "torch.distributed.checkpoint"),
        *("snaketron.train.sft_batches", "snaketron.inference.answers", "pyarrow.compute", "numpy.random"),
    ),
}


class Warm:
    """The program below, as its user sees it: one run at a time, beside those of other processes."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.variable = f"WARM_{kind.upper()}"  # of the environment: where the program listens
        self.name = os.environ.get(self.variable)
        self.process: subprocess.Popen[bytes] | None = None
        self.connection: socket.socket | None = None

    def serve(self, *arguments: str) -> None:
        """Start the program, for this process and those that it starts."""
        self.name = f"snaketron-tests-{os.getpid()}-{self.kind}"
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(f"\0{self.name}")  # without a file
            listening.listen()
            # -P: else the directory of this file would come first on the path of what is imported.
            command = [sys.executable, "-P", __file__, self.kind, str(listening.fileno()), *arguments]
            # Read when torch and numpy are imported: a process that forks has no other threads.
            threads = "OPENBLAS_NUM_THREADS" if self.kind == "pytest" else "OMP_NUM_THREADS"
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                pass_fds=[listening.fileno()],
                env=os.environ | {threads: "1"},
            )
        os.environ[self.variable] = self.name

    def start(
        self, arguments: list[str], directory: Path, environments: list[dict[str, str]], output: str
    ) -> list[int]:
        """The numbers of processes with these environments, which print into the file `output`.

        `arguments` are `snakemake ...`, or what stands after `python`: `-m MODULE ...`, `-c CODE` or
        `SCRIPT ...`.
        """
        with (
            Path(os.devnull).open(encoding="utf-8") as nothing,
            Path(output).open("a", encoding="utf-8") as said,
        ):
            return self.ask(arguments, directory, environments, (nothing, said, said))

    def ask(
        self,
        arguments: list[str],
        directory: Path,
        environments: list[dict[str, str]],
        files: tuple[IO[str], IO[str], IO[str]],
    ) -> list[int]:
        """Start processes with these files as standard input, output and error."""
        if self.connection is None:
            if self.name is None:
                self.serve()
            self.connection = socket.socket(socket.AF_UNIX)
            self.connection.connect(f"\0{self.name}")
        run = {"arguments": arguments, "directory": str(directory), "environments": environments}
        request = json.dumps(run).encode()
        socket.send_fds(self.connection, [len(request).to_bytes(8)], [file.fileno() for file in files])
        self.connection.sendall(request)
        return self.answer()

    def beside(self) -> Warm:
        """The same program, for a run beside those that are asked for here."""
        if self.name is None:
            self.serve()
        other = Warm(self.kind)
        other.name = self.name
        return other

    def ended(self, timeout: float | None = 0) -> bool:
        """Whether the processes of the last start have ended, within so many seconds."""
        assert self.connection
        return bool(select.select([self.connection], [], [], timeout)[0])

    def answer(self) -> list[int]:
        """What comes next: numbers of the processes, or their exit statuses once they have ended."""
        assert self.connection
        with self.connection.makefile("rb", buffering=0) as answers:
            return json.loads(answers.readline())

    statuses = answer

    def run(
        self, arguments: list[str], directory: Path, environments: list[dict[str, str]], timeout: float
    ) -> tuple[list[int], str]:
        """Exit statuses and output of processes that are started and waited for."""
        with tempfile.NamedTemporaryFile("r", encoding="utf-8") as output:
            numbers = self.start(arguments, directory, environments, output.name)
            try:
                if not self.ended(timeout):
                    raise subprocess.TimeoutExpired([self.kind, *arguments], timeout, output.read())
            except BaseException:  # a keyboard interrupt too: nothing of the run may live on
                for number in numbers:
                    os.killpg(number, signal.SIGKILL)
                raise
            finally:
                statuses = self.statuses()
            return statuses, output.read()

    def stop(self) -> None:
        """Wait for its end, so that `time pytest` counts what ran here."""
        if self.connection is not None:
            self.connection.close()
        if self.process is not None:
            self.process.communicate()
            os.environ.pop(self.variable, None)
            self.name = None
        self.process = self.connection = None


def become(directory: str, environment: dict[str, str], files: list[int]) -> None:
    """Be the process that a shell would have started."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]


def run(arguments: list[str]) -> Any:
    """Run Snakemake, or a module, code or a script as `python` does."""
    sys.argv = arguments
    if arguments[0] == "snakemake":
        from snakemake import cli

        return cli.main()
    if arguments[0] == "-m":
        sys.path.insert(0, str(Path.cwd()))
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments[0] == "-c":
        sys.modules["__main__"] = module = ModuleType("__main__")
        exec(arguments[1], vars(module))
    else:
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")
    return 0


def wait_for(processes: list[int], asking: socket.socket) -> list[int]:
    """The exit statuses. When one fails, the others are killed: they would wait for it.

    All are when the process that asked for them has ended.
    """
    statuses: dict[int, int] = {}
    running = {os.pidfd_open(process): process for process in processes}
    while running:
        ready, _, _ = select.select([asking, *running], [], [])
        ended = [number for number in ready if number in running]
        for number in ended:
            os.close(number)
            process = running.pop(number)
            statuses[process] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if asking in ready or any(statuses.values()):
            for process in running.values():
                kill(process)
    return [statuses[process] for process in processes]


def kill(process: int) -> None:
    """Kill a process, and what it has started where it leads a group."""
    with contextlib.suppress(ProcessLookupError):
        (os.killpg if os.getpgid(process) == process else os.kill)(process, signal.SIGKILL)


def prepare(kind: str, *arguments: str) -> None:
    """Import what the runs need."""
    for module in IMPORTED.get(kind, ()):
        importlib.import_module(module)
    if kind in IMPORTED:
        from snaketron.config import load

        load({}, {})  # pydantic builds what checks a configuration when it is first used
    if kind == "snakemake":
        sys.modules["snakemake.cli"].get_argument_parser()  # finds all plugins
    if kind == "pytest":
        import pytest

        with Path(os.devnull).open("w", encoding="utf-8") as nothing, contextlib.redirect_stdout(nothing):
            pytest.main([*arguments, "-n0", "--collect-only", "-qq"])
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]  # each process has tests of its own
    # The other thread that Python sees is that of jemalloc in pyarrow, and ready for a fork.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    gc.freeze()  # else a collection in a child would copy the memory that it shares


def serve(kind: str, asking: socket.socket) -> Any:
    """Start what one process asks for, one run after the other."""
    while True:
        head, files, _, _ = socket.recv_fds(asking, 8, 3)
        if not head:
            return 0
        request = json.loads(asking.recv(int.from_bytes(head), socket.MSG_WAITALL))
        processes = []
        for environment in request["environments"]:
            if (process := os.fork()) == 0:
                asking.close()
                if kind != "pytest":  # Ctrl-C ends pytest's processes, and they end these
                    os.setsid()
                become(request["directory"], environment, files)
                return run(request["arguments"])
            processes.append(process)
        for file in files:
            os.close(file)
        asking.sendall(f"{processes}\n".encode())
        statuses = wait_for(processes, asking)
        with contextlib.suppress(BrokenPipeError):
            asking.sendall(f"{statuses}\n".encode())


def begin(kind: str, number: str, *arguments: str) -> Any:
    """Have a process for each one that connects to the socket of this number, until standard input ends."""
    prepared = False
    with socket.socket(fileno=int(number)) as listening:
        while sys.stdin not in select.select([sys.stdin, listening], [], [])[0]:
            if not prepared:
                prepare(kind, *arguments)
                prepared = True
            asking, _ = listening.accept()
            with asking:
                if os.fork() == 0:
                    listening.close()
                    return serve(kind, asking)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def join(*arguments: str) -> int:
    """Be the process of pytest that `python -u -c CODE` would be."""
    asked = Warm("pytest")
    asked.ask([*arguments[1:]], Path.cwd(), [dict(os.environ)], (sys.stdin, sys.stdout, sys.stderr))
    return asked.statuses()[0]


def main(kind: str, *arguments: str) -> Any:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends those that run, and with them this
    return join(*arguments) if kind == "join" else begin(kind, *arguments)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
