"""Processes that have imported what takes long, and fork for each run.

Starting `snakemake` costs 1.4 s of CPU and a dry-run after that 0.2 s, and the tests run it some 300 times.
Importing torch and megatron-core costs 3 to 5 s, and the tests would do so another 60 times, beside the
processes that supervisors start. What runs is the program itself, in a process of its own with the directory
and the environment that it is given.

The program below is `python tests/warm.py snakemake` or `python tests/warm.py megatron`. It reads each run as
a line of JSON (`arguments`, `directory`, `output`, the file for what is printed, and `environments`, one for
each process), and answers with the numbers of the processes and, at the end, their exit statuses.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    ),
}


class Warm:
    """The program below, as its user sees it: one run at a time."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.process: subprocess.Popen[str] | None = None

    def start(
        self, arguments: list[str], directory: Path, environments: list[dict[str, str]], output: str
    ) -> list[int]:
        """The numbers of processes with these environments, which print into the file `output`.

        `arguments` are what stands after `snakemake`, or after `python`: `-m MODULE ...` or `SCRIPT ...`.
        """
        if self.process is None:
            # -P: else the directory of this file would come first on the path of what is imported.
            command = [sys.executable, "-P", __file__, self.kind]
            one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # torch reads it when it is imported
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=one_thread
            )
        assert self.process.stdin and self.process.stdout
        request = {"arguments": arguments, "directory": str(directory), "output": output}
        print(json.dumps(request | {"environments": environments}), file=self.process.stdin)
        return json.loads(self.process.stdout.readline())

    def ended(self, timeout: float = 0) -> bool:
        """Whether the processes of the last start have ended, within so many seconds."""
        assert self.process and self.process.stdout
        return bool(select.select([self.process.stdout], [], [], timeout)[0])

    def statuses(self) -> list[int]:
        """Exit statuses, once they have ended."""
        assert self.process and self.process.stdout
        return json.loads(self.process.stdout.readline())

    def run(
        self, arguments: list[str], directory: Path, environments: list[dict[str, str]], timeout: float
    ) -> tuple[list[int], str]:
        """Exit statuses and output of processes that are started and waited for."""
        with tempfile.NamedTemporaryFile("r") as output:
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
        if self.process is not None:
            self.process.communicate()


def become(arguments: list[str], directory: str, environment: dict[str, str], output: str) -> None:
    """Be the process that a shell would have started."""
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    for number, file, mode in ((0, os.devnull, os.O_RDONLY), (1, output, os.O_WRONLY | os.O_APPEND)):
        opened = os.open(file, mode)
        os.dup2(opened, number)
        os.close(opened)
    os.dup2(1, 2)
    sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    sys.argv = arguments


def snakemake(arguments: list[str]) -> Any:
    from snakemake import cli

    sys.argv = ["snakemake", *arguments]
    return cli.main()


def python(arguments: list[str]) -> Any:
    """Run a module or a script as `python` does."""
    if arguments[0] == "-m":
        sys.path.insert(0, str(Path.cwd()))
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")
    return 0


def wait_for(processes: list[int]) -> list[int]:
    """The exit statuses. When one fails, the others are killed: they would wait for it."""
    statuses: dict[int, int] = {}
    while len(statuses) < len(processes):
        process, status = os.wait()
        statuses[process] = os.waitstatus_to_exitcode(status)
        if status:
            for other in set(processes) - statuses.keys():
                os.killpg(other, signal.SIGKILL)
    return [statuses[process] for process in processes]


def main(kind: str) -> Any:
    for module in IMPORTED[kind]:
        importlib.import_module(module)
    program: Callable[[list[str]], Any] = python
    if kind == "snakemake":
        program = snakemake
        sys.modules["snakemake.cli"].get_argument_parser()  # finds all plugins
    gc.freeze()  # else a collection in a child would copy the memory that it shares
    while line := sys.stdin.readline():
        request = json.loads(line)
        environments, processes = request.pop("environments"), []
        for environment in environments:
            if (process := os.fork()) == 0:
                os.setsid()
                become(environment=environment, **request)
                return program(request["arguments"])
            processes.append(process)
        print(json.dumps(processes), flush=True)
        print(json.dumps(wait_for(processes)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
