"""The live view on a terminal: its last lines, drawn again and again while other lines scroll by above.

It changes no mode of the terminal, does not hide the cursor and leaves it at the beginning of a line. So also
what is killed leaves the terminal as it was.

Ctrl-C makes Linux drop what the terminal has not read yet, and can raise an exception between two writes. So
every write is a part that may be missing: it ends where it began, below the view, unless the view changes
its height. It has no line feed, since Linux passes on what stands before one by itself, and is mostly shorter
than the 2,048 bytes that Linux takes at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from snaketron.jobs.lines import Tail
from snaketron.log import SHOWN, UserError, name_of
from snaketron.report.live import Follower
from snaketron.report.screen import drawn

from rich.text import Text

LOOK_EVERY_S = 1.0
LISTEN_EVERY_S = 0.25  # to what jobs write to standard error
AWAY_S = 10.0  # after such a pause the process was stopped (Ctrl-Z), and other lines are below the view
NEXT = "\x1bE"  # to the beginning of the next line, as a line feed does
FAULTS = (OSError, ValueError, KeyError, UserError)  # files that are being replaced, or of another version


class Area:
    """The last lines of a terminal."""

    def __init__(self, file: int) -> None:
        self.file = file  # descriptor
        self.lines: list[str] = []
        self.lock = threading.RLock()
        self.at = time.monotonic()  # when it was drawn last

    @property
    def size(self) -> os.terminal_size:
        try:
            found = os.get_terminal_size(self.file)
        except OSError:
            found = os.terminal_size((0, 0))
        return found if found.columns and found.lines else shutil.get_terminal_size()

    def draw(self, lines: Sequence[str]) -> None:
        """Replace the lines by others; nothing while the process is in the background of its terminal."""
        with self.lock:
            if not self._in_front():
                self.lines = []
                return
            lines = self._fitting(lines)
            if self._rows() != len(lines):
                begin, self.lines = self._begin(), self.lines[: len(lines)]
                self._write(begin + NEXT * len(lines))
                self.lines = [""] * len(lines)
            self.at = time.monotonic()
            self._paint(lines)

    def say(self, text: str) -> None:
        """Write lines above, which stay."""
        with self.lock:
            said = "".join(f"{line}{NEXT if self.lines else '\n'}" for line in text.split("\n"))
            begin, lines = self._begin(), self._fitting(self.lines)
            self.lines = [""] * len(lines)
            self._write(begin + said + NEXT * len(lines))
            self._paint(lines)

    def show(self, follower: Follower, *, colors: bool) -> None:
        """Draw how far a run is; what was drawn before, where its files cannot be read now."""
        lines: Sequence[str] = self.lines
        with contextlib.suppress(*FAULTS):
            lines = drawn(follower.look(), *self.size, colors=colors)
        self.draw(lines)

    def clear(self) -> None:
        with self.lock:
            begin, self.lines = self._begin(), []
            self._write(begin)

    def _paint(self, lines: Sequence[str]) -> None:
        """Write the lines into their rows above the cursor, as long as the terminal keeps its size."""
        size = self.size
        for up, line in enumerate(reversed(lines), 1):
            if up < size.lines and self.size == size:
                self._write(f"\r\x1b[{up}A\x1b[K{line}\r\x1b[{up}B")
                self.lines[-up] = line

    def _fitting(self, lines: Sequence[str]) -> Sequence[str]:
        """The lines, without those that are wider than the terminal has become: they would take two rows."""
        columns = self.size.columns
        return [line if Text.from_ansi(line).cell_len <= columns else "" for line in lines]

    def _rows(self) -> int:
        """How many rows above the cursor the lines take: none when other lines are below them."""
        if time.monotonic() - self.at > AWAY_S:
            return 0
        columns, rows = self.size
        # A terminal that was made narrower has broken the lines.
        lengths = [Text.from_ansi(line).cell_len for line in self.lines]
        return min(sum(max(1, -(-length // columns)) for length in lengths), rows - 1)

    def _begin(self) -> str:
        """Codes that go to the first line of the area and clear everything from there on."""
        if up := self._rows():
            return f"\r\x1b[{up}A\x1b[J"
        return "\r\x1b[K" if self.lines else ""

    def _in_front(self) -> bool:
        try:
            return os.tcgetpgrp(self.file) == os.getpgrp()
        except OSError:  # it is not the terminal that this process is controlled by
            return True

    def _write(self, text: str) -> None:
        left = text.encode(errors="replace")
        while left:
            left = left[os.write(self.file, left) :]


class LiveView:
    """The view of the run of this process, in a thread.

    Jobs write to the terminal too, wherever they like. So a file takes their standard output and error while
    the view lasts, and what comes there is written above the view, line by line. It is a file and no pipe,
    because a job that outlives its Snakemake can go on writing to it.
    """

    def __init__(self, stream: TextIO, *, colors: bool) -> None:
        self.colors = colors
        self.follower = Follower(Path.cwd(), alive=True)
        self.area = Area(os.dup(stream.fileno()))
        self.taken = tempfile.TemporaryFile("w+b", buffering=0)  # noqa: SIM115  open as long as jobs write to it
        fcntl.fcntl(self.taken, fcntl.F_SETFL, os.O_APPEND | fcntl.fcntl(self.taken, fcntl.F_GETFL))
        self.heard = Tail(Path(f"/proc/self/fd/{self.taken.fileno()}"))
        self.streams: list[tuple[int, int]] = []  # descriptors, and copies of what they were
        for file in (sys.stdout.fileno(), sys.stderr.fileno()):
            if os.isatty(file):
                self.streams.append((file, os.dup(file)))
        sys.stdout.flush()
        sys.stderr.flush()
        for file, _ in self.streams:
            os.dup2(self.taken.fileno(), file)
        os.environ[SHOWN] = name_of(self.taken)
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self._run, name="live view", daemon=True)
        self.thread.start()

    def say(self, text: str) -> None:
        self._pass_on()
        self.area.say(text)

    def stop(self) -> None:
        self.ending.set()
        if threading.current_thread() is not self.thread:
            self.thread.join()
        with self.area.lock:
            if not self.streams:
                return
            self.area.clear()
            sys.stdout.flush()
            sys.stderr.flush()
            for file, before in self.streams:
                os.dup2(before, file)
                os.close(before)
            self.streams = []
            os.environ.pop(SHOWN, None)
            self._pass_on(everything=True)

    def _run(self) -> None:
        shown = -LOOK_EVERY_S
        try:
            while not self.ending.wait(LISTEN_EVERY_S):
                self._pass_on()
                if time.monotonic() - shown < LOOK_EVERY_S:
                    continue
                shown = time.monotonic()
                self.area.show(self.follower, colors=self.colors)
        finally:
            self.stop()  # also after a fault of this program: the lines go on without the view

    def _pass_on(self, *, everything: bool = False) -> None:
        """Write above what came from elsewhere; with `everything` also a line that is not complete."""
        with self.area.lock:
            for line in self.heard.lines():
                self.area.say(line.decode(errors="replace"))
            if everything and (rest := self.heard.rest()):
                self.area.say(rest.decode(errors="replace"))


def show(directory: Path) -> None:
    """Show the view of a directory once."""
    size = shutil.get_terminal_size((110, 100))
    print("\n".join(drawn(Follower(directory).look(), *size, colors=False)))


def watch(directory: Path, *, colors: bool) -> None:
    """Show the view of a directory until Ctrl-C, or once where standard output is no terminal."""
    if not sys.stdout.isatty():
        show(directory)
        return
    follower, area = Follower(directory), Area(sys.stdout.fileno())
    try:
        while True:
            area.show(follower, colors=colors)
            time.sleep(LOOK_EVERY_S)
    except KeyboardInterrupt:
        print()  # after "^C"; the last view stays
