"""The plugin of `--logger snaketron`: writes the lines of a run to the terminal."""

from __future__ import annotations

import logging
import sys

from snaketron.graph import swift
from snaketron.graph.lines import Lines

from snakemake_interface_logger_plugins.base import LogHandlerBase

RED, YELLOW, RESET, CLEAR = "\x1b[31m", "\x1b[33m", "\x1b[0m", "\r\x1b[K"
FAULTS = (
    AttributeError,
    KeyError,
    OSError,
    TypeError,
    ValueError,
)  # an event of another shape, a closed pipe


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
        self.stream = sys.stdout if settings.stdout else sys.stderr
        self.in_full = settings.verbose or (settings.dryrun and settings.printshellcmds)
        self.own_words = DefaultFormatter(settings.quiet, settings.show_failed_logs)
        self.lines = Lines(dryrun=settings.dryrun)
        if settings.dryrun and not self.in_full:
            swift.say_one_line()
        self.terminal = self.stream.isatty()
        self.colors = self.terminal and not settings.nocolor

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.own_words.format(record) if self.in_full else self.lines.of(record)
            if text:
                # A training may be writing its progress over one line, without a line break.
                clear = CLEAR if self.terminal else ""
                self.stream.write(f"{clear}{self._colored(text, record.levelno)}\n")
                self.stream.flush()
        except FAULTS:
            self.handleError(record)  # and the thread that writes goes on

    def _colored(self, text: str, level: int) -> str:
        if not self.colors or level < logging.WARNING:
            return text
        return f"{RED if level >= logging.ERROR else YELLOW}{text}{RESET}"
