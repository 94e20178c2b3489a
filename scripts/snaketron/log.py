"""How a script speaks: facts with numbers on standard error, and errors that tell the user what to do."""

from __future__ import annotations

import argparse
import errno
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

logger = logging.getLogger("snaketron")

NO_SPACE = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "file too large",
}


class _Terminal(logging.StreamHandler):
    """Writes to what is standard error when a line is written, not when the program began."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        pass


_terminal = _Terminal()


class UserError(Exception):
    """What is wrong, where (file and line, or configuration path), and what to do about it."""


def run(main: Callable[[], int]) -> None:
    """Run a script's `main` and leave with its exit status.

    A `UserError` and a full disk end in one line on standard error and status 1, an interrupt in
    status 130; anything else is our mistake and keeps its traceback.
    """
    logger.setLevel(logging.INFO)
    _terminal.setLevel(logging.INFO)
    logger.addHandler(_terminal)
    logging.raiseExceptions = False  # a log that a full disk cannot take is no reason for a traceback
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files are removed
    try:
        status = main()
    except UserError as error:
        status = _complain(str(error))
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        name = error.filename or "the output"
        status = _complain(
            f"cannot write {name}: {NO_SPACE[error.errno]}; free some and run the same command again"
        )
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the option that every script has: --log-file."""
    made = argparse.ArgumentParser(description=description, allow_abbrev=False)
    made.add_argument(
        "--log-file", type=Path, action=_LogFile, help="write the log there, and only warnings here"
    )
    return made


class _LogFile(argparse.Action):
    """Begins the log when the option is read, so that it holds what goes wrong after that as well."""

    def __call__(self, _parser: Any, namespace: argparse.Namespace, value: Any, _option: Any = None) -> None:
        setattr(namespace, self.dest, value)
        log_to(value, "w")
        _terminal.setLevel(logging.WARNING)


def log_to(path: Path, mode: str) -> None:
    """Let this process write its log to `path` as well, replacing it ("w") or at its end ("a")."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, mode)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)


def _complain(message: str) -> int:
    logger.error("error: %s", message)
    return 1
