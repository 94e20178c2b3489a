"""Run a job as it is, and kill it at a chosen moment."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from snaketron.jobs.launch import Ranks
from snaketron.jobs.owner import own
from snaketron.settings.training import LoraSettings, TrainSettings
from snaketron.train.stage import Stage, training_parser
from tests.conftest import MEGATRON, SNAKEMAKE, Result, Workspace

import psutil


def shell_lines(workspace: Workspace, target: str, *config: str) -> list[str]:
    """The commands that make `target`, as a dry-run prints them."""
    result = workspace.snakemake("-np", target, config=config)
    assert result.status == 0, result.output
    prefix = "Shell command: "
    return [line.removeprefix(prefix) for line in result.output.splitlines() if line.startswith(prefix)]


@contextlib.contextmanager
def ranks_of(workspace: Workspace, line: str) -> Iterator[tuple[list[str], list[dict[str, str]]]]:
    """The command of a training that a dry-run printed, and the environment of each of its processes.

    They are those that the command's supervisor would start, and need not import megatron-core any more.
    """
    script, *words = shlex.split(line)[1:]
    parser = training_parser(None)
    for option in ("--adapters", "--index"):
        parser.add_argument(option, type=Path)
    kind = LoraSettings if "lora.py" in script else TrainSettings
    with contextlib.chdir(workspace.path):
        stage = Stage.from_args(parser.parse_known_args(words)[0], kind)
        with own(stage.version) as owner:
            if "merge" not in script:
                stage.go_on()
            yield [script, *words], Ranks([script], stage.run, owner, None).environments


def run_forked(workspace: Workspace, line: str) -> Result:
    """Run the processes of a training. Then its command itself finds it finished, and publishes it."""
    with ranks_of(workspace, line) as (command, environments):
        statuses, output = MEGATRON.run(command, workspace.path, environments, 1200)
    if any(statuses):
        return Result(max(statuses, key=abs), output)
    result = workspace.run("bash", "-c", line)
    assert "these settings were trained before" in result.output, result.output[-3000:]
    return Result(result.status, output + result.output)


def kill_forked(workspace: Workspace, line: str, reached: Callable[[], bool]) -> None:
    """Run the processes of a training, and kill all of them as soon as `reached`, before they end."""
    log = workspace.path / "killed.log"
    with ranks_of(workspace, line) as (command, environments):
        numbers = MEGATRON.start(command, workspace.path, environments, str(log))
        try:
            wait_for(reached, MEGATRON.ended, log)
        finally:
            for number in numbers:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(number, signal.SIGKILL)
            MEGATRON.statuses()


class Forked:
    """Snakemake from a process that has imported it, with what is used here of `Popen`."""

    def __init__(
        self, command: list[str], directory: Path, output: Path, environment: Mapping[str, str] = os.environ
    ) -> None:
        self.program = SNAKEMAKE.beside()
        environments = [{**environment, "PYTHONUNBUFFERED": "1"}]
        (self.pid,) = self.program.start(command, directory, environments, str(output))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and self.program.ended():
            (self.returncode,) = self.program.statuses()
            self.program.stop()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        if self.returncode is None and not self.program.ended(timeout):
            raise subprocess.TimeoutExpired("snakemake", timeout or 0)
        return self.poll()


def wait_for(reached: Callable[[], bool], ended: Callable[[], bool], log: Path) -> None:
    """Wait for a moment, which comes before the end."""
    deadline = time.monotonic() + 900
    while not reached():
        assert not ended(), f"ended before the moment came:\n{log.read_text(encoding='utf-8')[-3000:]}"
        assert time.monotonic() < deadline, (
            f"the moment never came:\n{log.read_text(encoding='utf-8')[-3000:]}"
        )
        time.sleep(0.002)


def run_until(
    workspace: Workspace,
    command: list[str],
    reached: Callable[[], bool],
    number: signal.Signals,
    *,
    may_end: bool = False,
) -> tuple[int, str]:
    """Start `command` and send `number` to all its processes as soon as `reached`; status and output.

    It must be reached before the command ends, unless it `may_end` with success.
    """
    log = workspace.path / "killed.log"
    process: Forked | subprocess.Popen[bytes]
    with log.open("w") as output:
        if command[0] == "snakemake":
            process = Forked(command, workspace.path, log)
        else:
            process = subprocess.Popen(
                command, cwd=workspace.path, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
    try:
        try:
            wait_for(reached, lambda: process.poll() is not None, log)
        except AssertionError:
            if may_end and process.poll() == 0:
                return 0, log.read_text()
            raise
        # All at once: torchrun puts its workers in sessions of their own.
        everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.send_signal(number)
        process.wait(timeout=600)
        psutil.wait_procs(everyone, timeout=600)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=600)
    assert process.returncode is not None
    return process.returncode, log.read_text()


def kill_in(
    workspace: Workspace, command: list[str], moment: Callable[[], bool], forget: Callable[[], None]
) -> int:
    """Kill `command` at a moment that may last for milliseconds; the status.

    Where a busy machine misses it, `forget` takes away what was made, and it is made again.
    """
    for _ in range(5):
        status, _ = run_until(workspace, command, moment, signal.SIGKILL, may_end=True)
        if status != 0:
            break
        forget()
    return status


def newest(root: Path, version: str) -> int:
    """The step of the newest complete checkpoint of such a version below `root`.

    On a busy machine a kill may come later than the moment that it is for, after one more checkpoint.
    """
    (file,) = root.glob(f"versions/{version}/latest_checkpointed_iteration.txt")
    return int(file.read_text())


def exists(root: Path, pattern: str) -> Callable[[], bool]:
    return lambda: next(root.glob(pattern), None) is not None


def saved(root: Path, iteration: int, version: str = "*") -> Callable[[], bool]:
    """Whether some such version below `root` has a complete checkpoint of at least `iteration` steps."""

    def reached() -> bool:
        for file in root.glob(f"versions/{version}/latest_checkpointed_iteration.txt"):
            if int(file.read_text() or 0) >= iteration:
                return True
        return False

    return reached
