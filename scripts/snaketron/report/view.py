"""The live view on a terminal: its last lines, drawn again and again while other lines scroll by above.

It changes no mode of the terminal, does not hide the cursor and leaves it at the beginning of a line. So also
what is killed leaves the terminal as it was.
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

from snaketron.log import SHOWN, UserError, name_of
from snaketron.report.live import Follower
from snaketron.report.screen import drawn
from snaketron.tracking.lines import Tail

from rich.text import Text

LOOK_EVERY_S = 1.0
LISTEN_EVERY_S = 0.25  # to what jobs write to standard error
AWAY_S = 10.0  # after such a pause the process was stopped (Ctrl-Z), and other lines are below the view
FAULTS = (OSError, ValueError, KeyError, UserError)  # files that are being replaced, or of another version


class Area:
    """The last lines of a terminal."""

    def __init__(self, file: int) -> None:
        self.file = file  # descriptor
        self.lines: Sequence[str] = ()
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
                self.lines = ()
                return
            begin = self._begin()
            self.lines, self.at = lines, time.monotonic()
            self._write(begin + "".join(f"{line}\n" for line in lines))

    def say(self, text: str) -> None:
        """Write lines above, which stay."""
        with self.lock:
            self._write(self._begin() + f"{text}\n" + "".join(f"{line}\n" for line in self.lines))

    def clear(self) -> None:
        with self.lock:
            if begin := self._begin():
                self._write(begin)
            self.lines = ()

    def _begin(self) -> str:
        """Codes that go to the first line of the area and clear everything from there on."""
        if not self.lines or time.monotonic() - self.at > AWAY_S:
            return "\r\x1b[K" if self.lines else ""
        columns, rows = self.size
        # A terminal that was made narrower has broken the lines.
        lengths = [Text.from_ansi(line).cell_len for line in self.lines]
        up = sum(max(1, -(-length // columns)) for length in lengths)
        return f"\r\x1b[{min(up, rows - 1)}A\x1b[J"

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
                lines = self.area.lines
                with contextlib.suppress(*FAULTS):
                    lines = drawn(self.follower.look(), *self.area.size, colors=self.colors)
                self.area.draw(lines)
        finally:
            self.stop()  # also after a fault of this program: the lines go on without the view

    def _pass_on(self, *, everything: bool = False) -> None:
        """Write above what came from elsewhere; with `everything` also a line that is not complete."""
        with self.area.lock:
            for line in self.heard.lines():
                self.area.say(line.decode(errors="replace"))
            if everything and (rest := self.heard.rest()):
                self.area.say(rest.decode(errors="replace"))


def watch(directory: Path, *, colors: bool) -> None:
    """Show the view of a directory until Ctrl-C, or once where standard output is no terminal."""
    follower = Follower(directory)
    if not sys.stdout.isatty():
        print("\n".join(drawn(follower.look(), *shutil.get_terminal_size((110, 100)), colors=False)))
        return
    area = Area(sys.stdout.fileno())
    try:
        while True:
            lines = area.lines
            with contextlib.suppress(*FAULTS):
                lines = drawn(follower.look(), *area.size, colors=colors)
            area.draw(lines)
            time.sleep(LOOK_EVERY_S)
    except KeyboardInterrupt:
        print()  # after "^C"; the last view stays
