"""The plugin of `--logger snaketron`: writes the lines of a run to the terminal."""

from __future__ import annotations

import logging
import sys

from snaketron.graph.lines import Lines

from snakemake_interface_logger_plugins.base import LogHandlerBase

RED, YELLOW, RESET = "\x1b[31m", "\x1b[33m", "\x1b[0m"


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
        self.colors = self.stream.isatty() and not settings.nocolor

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.own_words.format(record) if self.in_full else self.lines.of(record)
            if text:
                self.stream.write(f"{self._colored(text, record.levelno)}\n")
                self.stream.flush()
        except Exception:  # a logging handler reports its own faults so
            self.handleError(record)

    def _colored(self, text: str, level: int) -> str:
        if not self.colors or level < logging.WARNING:
            return text
        return f"{RED if level >= logging.ERROR else YELLOW}{text}{RESET}"
