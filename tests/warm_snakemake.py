"""A process that has imported Snakemake and forks for each run of it.

Starting `snakemake` costs 1.4 s of CPU and a dry-run after that 0.4 s, and the tests run it some 300 times.
What runs is Snakemake's own command line, in a process of its own with the directory and the environment that
it is given. The program reads each run as a line of JSON (`arguments`, `directory`, `environment`, and
`output`, the file for what is printed), and answers with the process id and, at the end, the exit status.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# What every run imports after it has begun.
LATER = ("docutils.core", "dpath", "jinja2", "PIL.Image", "pygments.lexers", "requests", "snaketron.config")


class WarmSnakemake:
    """The program below, as its user sees it: one run at a time."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def run(
        self, arguments: list[str], directory: Path, environment: dict[str, str], timeout: float
    ) -> tuple[int, str]:
        """Exit status and output of `snakemake ARGUMENTS`."""
        if self.process is None:
            # -P: else the directory of this file would come first on the path of what is imported.
            command = [sys.executable, "-P", __file__]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
        assert self.process.stdin and self.process.stdout
        with tempfile.NamedTemporaryFile("r") as output:
            request = {"arguments": arguments, "directory": str(directory), "output": output.name}
            print(json.dumps(request | {"environment": environment}), file=self.process.stdin)
            number = int(self.process.stdout.readline())
            try:
                if not select.select([self.process.stdout], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired(["snakemake", *arguments], timeout, output.read())
            except BaseException:  # a keyboard interrupt too: nothing of the run may live on
                os.killpg(number, signal.SIGKILL)
                raise
            finally:
                status = int(self.process.stdout.readline())
            return status, output.read()

    def stop(self) -> None:
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
    sys.argv = ["snakemake", *arguments]


def main() -> Any:
    from snakemake import cli

    for module in LATER:
        importlib.import_module(module)
    cli.get_argument_parser()  # finds all plugins
    gc.freeze()  # else a collection in a child would copy the memory that it shares
    while request := sys.stdin.readline():
        if (process := os.fork()) == 0:
            os.setsid()
            become(**json.loads(request))
            return cli.main()
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
