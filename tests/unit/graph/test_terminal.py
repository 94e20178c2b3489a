"""The plugin that Snakemake finds: where it writes, and when it leaves Snakemake's own words."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass

from snakemake_logger_plugin_snaketron import LogHandler

import pytest
from snakemake_interface_logger_plugins.common import LogEvent
from snakemake_interface_logger_plugins.registry import LoggerPluginRegistry
from snakemake_interface_logger_plugins.settings import OutputSettingsLoggerInterface


@dataclass
class Settings(OutputSettingsLoggerInterface):
    printshellcmds: bool = False
    nocolor: bool = False
    quiet = None
    debug_dag: bool = False
    verbose: bool = False
    show_failed_logs: bool = False
    stdout: bool = False
    dryrun: bool = False


def command() -> logging.LogRecord:
    """The message with the command of a job."""
    record = logging.LogRecord("snakemake", logging.INFO, "", 0, "Shell command: python", None, None)
    record.__dict__.update(event=LogEvent.SHELLCMD, shellcmd="python", indent=False)
    return record


def test_snakemake_finds_the_plugin_that_the_profiles_name():
    assert LoggerPluginRegistry().get_plugin("snaketron").log_handler is LogHandler


@pytest.mark.parametrize(
    ("settings", "printed"),
    [
        (Settings(), ""),
        (Settings(printshellcmds=True), ""),
        (Settings(dryrun=True), ""),
        (Settings(dryrun=True, printshellcmds=True), "Shell command: python\n"),
        (Settings(verbose=True), "Shell command: python\n"),
    ],
)
def test_commands_are_printed_when_all_is_asked_for(
    settings: Settings, printed: str, capsys: pytest.CaptureFixture[str]
):
    LogHandler(settings, None).emit(command())
    assert capsys.readouterr().err == printed


def test_where_the_caller_has_closed_the_output_nothing_is_printed(monkeypatch: pytest.MonkeyPatch):
    """As after `>&-`."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    handler = LogHandler(Settings(), None)
    handler.emit(logging.LogRecord("snakemake", logging.WARNING, "", 0, "Beware", None, None))
    assert not handler.wants_view


def test_on_a_terminal_a_line_clears_the_progress_of_a_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    handler = LogHandler(Settings(), None)
    record = logging.LogRecord("snakemake", logging.WARNING, "", 0, "Beware", None, None)
    handler.emit(record)
    assert capsys.readouterr().err == "\r\x1b[K\x1b[33mBeware\x1b[0m\n"
