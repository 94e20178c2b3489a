"""The plugin of `--logger snaketron`: writes the lines of a run to the terminal, above a live view."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from typing import Protocol

from snaketron.graph.lines import Lines
from snaketron.graph.snakemake import swift
from snaketron.log import PLAIN

from snakemake_interface_logger_plugins.base import LogHandlerBase

RED, YELLOW, RESET, CLEAR = "\x1b[31m", "\x1b[33m", "\x1b[0m", "\r\x1b[K"
# An event of another shape, a closed pipe.
FAULTS = (AttributeError, KeyError, OSError, TypeError, ValueError)

_handlers: list[LogHandler] = []  # of this process


def begin_view() -> None:
    """Have the live view from now on, where the terminal can show one.

    The main thread calls it before it starts the first job, so that no job has the terminal itself as its
    standard error. Messages come to a handler in another thread, and later.
    """
    for handler in _handlers:
        handler.show_view()


class LiveView(Protocol):
    """The last lines of a terminal, which tell how far a run is."""

    def say(self, text: str) -> None:
        """Write lines above it."""

    def stop(self) -> None:
        """Leave the terminal as it was; later calls do nothing."""


class LogHandler(LogHandlerBase):
    """Snakemake's own words are left where all is asked for: by `--verbose`, and by `-np`."""

    writes_to_stream = True
    writes_to_file = False
    has_filter = False
    has_formatter = True
    needs_rulegraph = False

    def __post_init__(self) -> None:
        from snakemake.logging import DefaultFormatter

        settings = self.common_settings
        # Python has None where the caller has closed it, as by `>&-`.
        self.stream = (sys.stdout if settings.stdout else sys.stderr) or io.StringIO()
        self.in_full = settings.verbose or (settings.dryrun and settings.printshellcmds)
        self.own_words = DefaultFormatter(settings.quiet, settings.show_failed_logs)
        self.lines = Lines(dryrun=settings.dryrun)
        if settings.dryrun and not self.in_full:
            swift.say_one_line()
        self.terminal = self.stream.isatty()
        self.colors = self.terminal and not settings.nocolor and not os.environ.get("NO_COLOR")
        self.view: LiveView | None = None
        _handlers.append(self)

    def show_view(self) -> None:
        if self.wants_view and not self.view:
            with contextlib.suppress(OSError):  # lines alone, where no file can take what jobs write
                self.view = self.begin_view()

    def begin_view(self) -> LiveView | None:
        """The live view of a run that begins; the plugin knows one, and this room does not."""
        return None

    @property
    def wants_view(self) -> bool:
        plain = os.environ.get(PLAIN, "") not in ("", "0") or os.environ.get("TERM", "dumb") == "dumb"
        # Bars and curves are drawn in Unicode.
        plain = plain or not (self.stream.encoding or "").lower().startswith("utf")
        return self.terminal and not (plain or self.in_full or self.common_settings.dryrun)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.own_words.format(record) if self.in_full else self.lines.of(record)
            if self.view:
                if text and not getattr(record, "in_view", False):
                    self.view.say(self._colored(text, record.levelno))
            elif text:
                # A training may be writing its progress over one line, without a line break.
                clear = CLEAR if self.terminal else ""
                self.stream.write(f"{clear}{self._colored(text, record.levelno)}\n")
                self.stream.flush()
        except FAULTS:
            self.handleError(record)  # and the thread that writes goes on

    def close(self) -> None:
        """Snakemake calls it at its end, and Python at the end of a process that failed."""
        if self.view:
            self.view.stop()
            self.view = None
        if self in _handlers:
            _handlers.remove(self)
        super().close()

    def _colored(self, text: str, level: int) -> str:
        if not self.colors or level < logging.WARNING:
            return text
        return f"{RED if level >= logging.ERROR else YELLOW}{text}{RESET}"
