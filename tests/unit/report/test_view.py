"""The live view on a real terminal: what scrolls by stays, and nothing else is left at the end."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import tty
from collections.abc import Callable
from pathlib import Path

from snaketron.report import view
from snaketron.report.view import Area
from tests.conftest import Workspace
from tests.unit.report.live_run import BROAD, SFT, RunLog, train

import pytest

# Snakemake as the view sees it: the table of jobs, other messages, and a job that writes to the terminal.
PROGRAM = """
import logging, subprocess, sys, time
from pathlib import Path
from snakemake_interface_logger_plugins.common import LogEvent
from snakemake_logger_plugin_snaketron import LogHandler
from snaketron.graph import terminal
from tests.unit.graph.test_terminal import Settings

def record(text, event=None, **extra):
    made = logging.LogRecord("snakemake", logging.INFO, "", 0, text, None, None)
    made.__dict__.update(extra, event=event)
    return made

handler = LogHandler(Settings(), None)
handler.emit(record("the table of jobs", LogEvent.RUN_INFO, stats={"total": 7}))
terminal.begin_view()
handler.emit(record("an important line"))
handler.emit(record("a line about Slurm", in_view=True))
job = "import sys; from snaketron import log as l; l.show_progress('1'); sys.stderr.write('a job warns\\\\n')"
subprocess.run([sys.executable, "-c", job])
try:
    Path("ready").touch()  # from here on Ctrl-C is caught
    while not Path("go").exists():
        time.sleep(0.05)
        if Path("resize").exists():
            with handler.view.area.lock:
                Path("resize").rename("still")
                while Path("still").exists():
                    time.sleep(0.01)
    if Path("go").read_text() == "crash":
        raise RuntimeError("a fault")
    handler.emit(record("the last line"))
    handler.close()
    print("said after the view", file=sys.stderr)
except KeyboardInterrupt:
    handler.emit(record("stopped"))
    handler.close()
    sys.exit(130)
"""


class Terminal:
    """A pseudo-terminal with a program on it, and what a person would see there."""

    def __init__(self, directory: Path, columns: int, *command: str, **environment: str) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.modes = termios.tcgetattr(slave)
        root = str(Path(__file__).parents[3])
        given = os.environ | {"TERM": "xterm-256color", "PYTHONPATH": root, "COLUMNS": "", **environment}

        def prepare() -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [sys.executable, *(command or ("-c", PROGRAM))],
            cwd=directory,
            env=given,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=prepare,
        )
        self.slave, self.output, self.directory = slave, "", directory
        self.decoder = codecs.getincrementaldecoder("utf-8")()  # a character may come in two parts

    def read(self, until: Callable[[], bool], seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, self.output
            if select.select([self.master], [], [], 0.1)[0]:
                self.take()

    def resize(self, columns: int) -> int:
        """Make it narrower, between two drawings; returns how much of the output was for the old size.

        A line that is written while the size changes may be for the old one.
        """
        still = self.directory / "still"
        (self.directory / "resize").touch()
        self.read(still.exists)
        self.drain()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        still.unlink()
        return len(self.output)

    def drain(self) -> None:
        while select.select([self.master], [], [], 0.2)[0]:
            self.take()

    def take(self) -> None:
        self.output += self.decoder.decode(os.read(self.master, 1 << 16))

    def go(self, how: str = "on") -> None:
        temporary = self.directory / ".go"
        temporary.write_text(how)
        temporary.rename(self.directory / "go")

    def wait(self) -> int:
        self.read(lambda: self.process.poll() is not None)
        self.drain()
        assert termios.tcgetattr(self.slave) == self.modes
        assert "\x1b[?" not in self.output  # neither another screen nor a hidden cursor
        return self.process.returncode


def screen(output: str, resized: int | None = None, columns: int = 1000) -> list[str]:
    """The lines that a terminal of enough rows shows; the last one has the cursor.

    After `resized` characters of the output it has `columns`, and has broken the lines that are longer.
    """
    lines, row, column = [""], 0, 0
    output = re.sub(r"\x1b(\[[\d;?]*)?$", "", output)  # a colour of which half was read so far
    for found in re.finditer(r"\x1b\[[\d;?]*[A-Za-z]|\x1bE|[^\x1b]", output):
        part, width = found[0], columns if resized is not None and found.start() >= resized else 1000
        if part == "\r":
            column = 0
        elif part in ("\n", "\x1bE"):
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part[0] != "\x1b":
            lines[row] = lines[row][:column] + part + lines[row][column + 1 :]
            column += 1
        elif part[-1] == "A":
            up = int(part[2:-1])
            while up > 0:
                assert row > 0, "above the first line"
                row -= 1
                up -= max(1, -(-len(lines[row]) // width))
            assert up == 0, "the cursor is in the middle of a broken line"
        elif part[-1] == "B":
            row += int(part[2:-1])
        elif part[-1] in "JK":
            lines[row] = lines[row][:column]
            del lines[row + 1 : len(lines) if part[-1] == "J" else row + 1]
    return lines


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    log = RunLog(tmp_path, {"tokenize_shard": 4, "blend_pretrain": 1, "pretrain": 1, "sft": 1}, BROAD | SFT)
    log.begins(7, "pretrain", "ckpt/pretrain/broad", phase="broad")
    train(tmp_path, "pretrain/broad", 120, 196)
    return tmp_path


SAID = ["the table of jobs", "an important line", "a job warns"]


@pytest.mark.parametrize("columns", [40, 100])
def test_a_run_ends_with_its_lines_and_a_clean_terminal(directory: Path, columns: int):
    terminal = Terminal(directory, columns, **({"NO_COLOR": "1"} if columns == 40 else {}))
    terminal.read(lambda: "120/196" in terminal.output and "a job warns" in terminal.output)
    assert ("\x1b[36m" in terminal.output) == (columns == 100)
    during = screen(terminal.output)
    assert [line for line in during if line in SAID] == SAID
    assert all(len(line) < columns for line in during)
    before = terminal.resize(columns - 8)
    terminal.read(lambda: "120/196" in terminal.output[before:])
    terminal.go()
    assert terminal.wait() == 0
    assert screen(terminal.output, before, columns - 8) == [*SAID, "the last line", "said after the view", ""]


def test_ctrl_c_leaves_what_was_said(directory: Path):
    terminal = Terminal(directory, 80)
    terminal.read(lambda: "120/196" in terminal.output and "a job warns" in terminal.output)
    terminal.read(lambda: (directory / "ready").exists())
    os.write(terminal.master, b"\x03")
    assert terminal.wait() == 130
    assert [line.removeprefix("^C") for line in screen(terminal.output)] == [*SAID, "stopped", ""]


def test_a_crash_leaves_its_traceback(directory: Path):
    terminal = Terminal(directory, 80)
    terminal.read(lambda: "120/196" in terminal.output and "a job warns" in terminal.output)
    terminal.go("crash")
    assert terminal.wait() == 1
    left = screen(terminal.output)
    assert left[:4] == [*SAID, "Traceback (most recent call last):"]
    assert left[-2:] == ["RuntimeError: a fault", ""]


def test_plain_lines_where_they_are_asked_for(directory: Path):
    terminal = Terminal(directory, 80, SNAKETRON_PLAIN="1")
    terminal.read(lambda: "a job warns" in terminal.output)
    terminal.go()
    assert terminal.wait() == 0
    assert "120/196" not in terminal.output and "a line about Slurm" in terminal.output


def test_snakemake_shows_it_and_leaves_its_lines(workspace: Workspace):
    command = workspace.command("data/sample/questions/part_0.jsonl")[1:]
    terminal = Terminal(workspace.path, 100, "-m", "snakemake", *command)
    terminal.read(lambda: "▶ sample_chat" in terminal.output or terminal.process.poll() is not None)
    assert terminal.wait() == 0
    left = [re.sub(r"(\d+:)+\d\d", "", line) for line in screen(terminal.output)]
    done = "[] sample_chat questions is done after  (1 of 1)"
    assert left[-4:] == ["[] sample_chat questions starts", done, "All jobs are done, after .", ""]


@pytest.fixture
def area(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """An area of a terminal of 20 columns and 10 rows, and what was written to it."""
    with (tmp_path / "terminal").open("w+b", buffering=0) as file:
        monkeypatch.setattr(Area, "size", os.terminal_size((20, 10)))
        yield Area(file.fileno()), lambda: (tmp_path / "terminal").read_bytes().decode()


def test_after_a_resize_the_lines_that_the_terminal_broke_are_counted(area, monkeypatch: pytest.MonkeyPatch):
    drawn, written = area
    drawn.draw(["x" * 19, "\x1b[36mshort\x1b[0m"])
    monkeypatch.setattr(Area, "size", os.terminal_size((8, 10)))
    drawn.draw(["y"])
    # 19 characters in 3 rows of 8, and one more
    assert written().endswith("\r\x1b[4A\x1b[J\x1bE\r\x1b[1A\x1b[Ky\r\x1b[1B")


def test_what_is_said_after_a_resize_is_above_the_lines_that_still_fit(area, monkeypatch: pytest.MonkeyPatch):
    drawn, written = area
    drawn.draw(["x" * 19, "short"])
    before = len(written())
    monkeypatch.setattr(Area, "size", os.terminal_size((8, 10)))
    drawn.say("said")
    assert screen(written(), before, 8) == ["said", "", "short", ""]


def test_after_a_pause_nothing_that_others_wrote_is_removed(area, monkeypatch: pytest.MonkeyPatch):
    """After Ctrl-Z and fg, say, lines of the shell are below the view."""
    drawn, written = area
    drawn.draw(["a"])
    monkeypatch.setattr(view, "AWAY_S", -1.0)
    drawn.draw(["b"])
    assert screen(written()) == ["a", "b", ""]


def said_until_interrupted(monkeypatch: pytest.MonkeyPatch, at: int, how: str) -> list[str] | None:
    """What a terminal shows at the end when Ctrl-C comes at a write; None when there are fewer writes."""
    master, slave = pty.openpty()
    tty.setraw(master)
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    writes, output, write = 0, b"", os.write

    def interrupted(file: int, data: bytes) -> int:
        nonlocal writes, output
        writes += 1
        if writes == at and how == "before":
            raise KeyboardInterrupt
        count = write(file, data)
        if writes == at and how == "after":
            raise KeyboardInterrupt
        if writes == at:
            write(master, b"\x03")  # Linux drops what was not read
        elif writes < at:
            output += read(count)
        return count

    def read(count: int) -> bytes:
        return b"".join(os.read(master, 1) for _ in range(count))

    area = Area(slave)
    area.draw(["a frame " * 9] * 3)
    with monkeypatch.context() as context:
        context.setattr(os, "write", interrupted)
        with contextlib.suppress(KeyboardInterrupt):
            area.say("said before")
            area.draw(["\x1b[36manother\x1b[0m " * 9] * 3)
            area.draw(["a third"] * 3)
    area.say("stopped")
    area.clear()
    while select.select([master], [], [], 0.05)[0]:
        output += os.read(master, 1 << 16)
    for file in (master, slave):
        os.close(file)
    return screen(output.decode().replace("^C", "")) if writes >= at else None


@pytest.mark.parametrize("how", ["before", "after", "by the terminal"])
def test_ctrl_c_at_any_write_leaves_what_was_said_and_nothing_of_the_view(
    monkeypatch: pytest.MonkeyPatch, how: str
):
    left = [said_until_interrupted(monkeypatch, at, how) for at in range(1, 12)]
    assert left[-1] is None and None not in left[:10]
    assert left[0] in (["stopped", ""], ["said before", "stopped", ""])  # the line itself was cut or not
    assert left[1:10] == [["said before", "stopped", ""]] * 9


def test_nothing_is_drawn_in_the_background(area, monkeypatch: pytest.MonkeyPatch):
    drawn, written = area
    monkeypatch.setattr(os, "tcgetpgrp", lambda file: os.getpgrp() + 1)
    drawn.draw(["a"])
    drawn.say("said")
    assert written() == "said\n"


def test_watching_where_there_is_no_terminal_shows_the_view_once(
    directory: Path, monkeypatch: pytest.MonkeyPatch, run_script, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(directory)
    assert run_script("status", "--watch") == (0, "")
    view.watch(directory, colors=True)
    said = capsys.readouterr().out
    assert "■ pretrain/broad" in said and "120/196" in said and "\x1b" not in said
