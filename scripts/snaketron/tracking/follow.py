"""The process that follows a training: it reads what the training leaves on disk, and tells the sinks.

It stands beside the processes of the training and not in them. So a server that does not answer, a disk that
is full or a command that hangs costs the training nothing, and the random numbers, signals and memory of the
training are its own. The supervisor starts it with a `Run` on its standard input, and closes that when the
training has ended.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import snaketron
from snaketron.jobs.attempts import read_attempts
from snaketron.jobs.lines import Tail, line_of_metrics
from snaketron.lineage.record import Entry
from snaketron.log import UserError, log_to, logger
from snaketron.log import run as run_script
from snaketron.tracking.notify import tell
from snaketron.tracking.sinks import Run, Sink
from snaketron.tracking.warnings import warnings_of
from snaketron.wording import after

import orjson

PROGRAM = [sys.executable, "-m", "snaketron.tracking.follow"]
POLL_S = 1.0
END_S = 75.0  # for all sinks to finish; W&B has 30 s to answer and 30 s to take what is left
STOP_S = 5.0  # that a stopped or failed training waits for its follower, which goes on by itself


@contextlib.contextmanager
def following(run: Run, environment: Mapping[str, str], log_file: Path | None) -> Iterator[None]:
    """Have a process follow the training while the block runs; nothing where there is nothing to tell."""
    if run.mode == "off" and not run.tensorboard and not run.notify:
        yield
        return
    process = _start(run, environment, log_file)
    try:
        yield
    finally:
        if process:
            _end(process, run)


def _start(run: Run, environment: Mapping[str, str], log_file: Path | None) -> subprocess.Popen[bytes] | None:
    package = str(Path(snaketron.__file__).parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    try:
        process = subprocess.Popen(
            PROGRAM,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=os.environ | environment | {"PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C on the terminal is for the supervisor
        )
        order = dataclasses.asdict(run) | {"log_file": log_file and str(log_file)}
        assert process.stdin is not None
        process.stdin.write(orjson.dumps(order, default=str) + b"\n")
        process.stdin.flush()
    except OSError as error:
        logger.warning("%s: is not tracked: %s; its metrics are in metrics.jsonl", run.stage, error)
        return None
    return process


def _end(process: subprocess.Popen[bytes], run: Run) -> None:
    """Let the follower finish, for as long as a training may wait for it."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # it has died
        process.stdin.close()
    finished = run.version.is_finished
    try:
        process.wait(END_S + run.upload_s if finished else STOP_S)
    except subprocess.TimeoutExpired:
        if finished:
            process.kill()
            process.wait()
            logger.warning(
                "%s: tracking did not end within %d s and was left; `wandb sync` sends what W&B lacks",
                run.stage,
                END_S + run.upload_s,
            )
    else:
        if process.returncode:
            logger.warning(
                "%s: tracking has died (status %d) and lacks what came after that, which metrics.jsonl has",
                run.stage,
                process.returncode,
            )


# ------------------------------------------------------------------------------------- in the process


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: None)  # the end of the training ends it, and soon
    order = orjson.loads(sys.stdin.buffer.readline() or b"{}")
    if not order:
        return 1
    if log_file := order.pop("log_file"):
        log_to(Path(log_file))
    inputs = [Entry(**entry) for entry in order.pop("inputs")]
    run = Run(directory=Path(order.pop("directory")), inputs=inputs, **order)
    log_to(run.version.log)
    Follower(run).follow(lambda seconds: _ended(run, seconds))
    return 0


def _ended(run: Run, seconds: float) -> bool:
    """Wait so long for the training to end."""
    readable, _, _ = select.select([sys.stdin], [], [], seconds)
    if readable:
        watchdog = threading.Timer(END_S + run.upload_s + STOP_S, os._exit, (1,))  # where nobody waits
        watchdog.daemon = True
        watchdog.start()
    return bool(readable)


class Follower:
    """What was told so far of one training."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.sinks: list[Sink] = []
        self.metrics = Tail(run.version.metrics)
        self.told: set[tuple[int, str]] = set()
        self.attempts = run.attempts

    def follow(self, ended: Callable[[float], bool]) -> None:
        """Tell the sinks what happens, until `ended`, which waits as long as it is told, says so."""
        for make in _sinks(self.run):
            self._try("", lambda make=make: self.sinks.append(make(self.run)))  # type: ignore[misc]
        is_over = False
        while not is_over:
            is_over = ended(POLL_S)
            self.lines()
            outcome = self.outcomes()
        for sink in list(self.sinks):
            self._try(sink.name, lambda sink=sink: sink.finish(outcome), sink)  # type: ignore[misc]

    def lines(self) -> None:
        """Tell the lines that are new. A training that was killed writes some again, with the same values."""
        self.metrics.changed()  # a continued training replaces the file
        for text in self.metrics.lines():
            if (line := line_of_metrics(text)) is None:
                continue
            key = line["iteration"], next((name for name in line if name.endswith("loss")), "")
            if key in self.told:
                continue
            self.told.add(key)
            self._tell(lambda sink, line=line: sink.log(line))  # type: ignore[misc]
            for warning in warnings_of([line]) if line["iteration"] > self.run.steps else ():
                self.alert(warning.kind, f"step {warning.iteration}: {warning.text}", failed=False)

    def outcomes(self) -> str | None:
        """Tell how attempts ended; the outcome of the last one."""
        try:
            attempts = read_attempts(self.run.version.attempts)
        except (OSError, UserError):
            return None
        if not attempts:
            return None
        for attempt in attempts[self.attempts :]:
            if attempt.outcome is None:
                break
            self.attempts += 1
            if attempt.has_failed:
                self.alert(attempt.outcome, f"{after(attempt.iteration)}: {attempt.error}", failed=True)
            if attempt.outcome == "hung" and self.run.notify:
                tell(self.run.notify, "stalled", self.run.version, error=attempt.error)
        return "finished" if self.run.version.is_finished else attempts[-1].outcome

    def alert(self, kind: str, text: str, *, failed: bool) -> None:
        title = f"{self.run.stage}: {kind}"
        self._tell(lambda sink: sink.alert(title, text, failed=failed))

    def _tell(self, what: Callable[[Sink], None]) -> None:
        for sink in list(self.sinks):
            self._try(sink.name, lambda sink=sink: what(sink), sink)  # type: ignore[misc]

    def _try(self, name: str, action: Callable[[], None], sink: Sink | None = None) -> None:
        try:
            action()
        except Exception as error:
            if sink:
                self.sinks.remove(sink)
            logger.warning(
                "%s: %s%s: %s; the training goes on without it, and its metrics are in metrics.jsonl",
                self.run.stage,
                f"{name}: " if name else "",
                type(error).__name__,
                " ".join(str(error).split()),
            )


def _sinks(run: Run) -> Iterator[Callable[[Run], Sink]]:
    if run.mode != "off":
        from snaketron.tracking.wandb import WandB

        yield WandB
    if run.tensorboard:
        from snaketron.tracking.tensorboard import TensorBoard

        yield TensorBoard


if __name__ == "__main__":
    run_script(main)
