"""How a script speaks: facts with numbers on standard error, and errors that tell the user what to do."""

from __future__ import annotations

import argparse
import contextlib
import errno
import gc
import logging
import os
import select
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TextIO

logger = logging.getLogger("snaketron")

# Variables of the environment:
PLAIN = "SNAKETRON_PLAIN"  # asks for plain lines in place of the live view; it is no key of the configuration
SHOWN = "LIVE_VIEW_TAKES"  # which file takes standard error while a live view shows the progress
RECORD = "JOB_RECORD"  # where a Slurm job notes how it fares

NO_SPACE = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "file too large",
}

_NOT_ALLOWED = {
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
    errno.EROFS: "the file system is read-only",
}


class _Terminal(logging.StreamHandler):
    """Writes to what is standard error when a line is written, not when the program began."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        pass

    def emit(self, record: logging.LogRecord) -> None:
        end_progress()
        super().emit(record)


_terminal = _Terminal()


_in_progress = False  # whether the last line of the terminal waits to be replaced


def show_progress(text: str) -> None:
    """Show a line on the terminal in the place of the last one of this function; anywhere else a new line.

    Nothing where a live view shows progress. A program goes on where the terminal or the reader of its output
    has gone, or the disk of the output is full.
    """
    global _in_progress
    if os.environ.get(SHOWN) and os.environ[SHOWN] == name_of(sys.stderr):
        return
    with contextlib.suppress(OSError):
        if sys.stderr.isatty():
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
            _in_progress = True
        else:
            print(text, file=sys.stderr, flush=True)


def name_of(stream: IO[Any]) -> str:
    """What the kernel calls the file behind a stream, in each process that has it open; "" for none."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return ""
    return f"{found.st_dev}:{found.st_ino}"


def end_progress() -> None:
    """Let what is written next begin on a line of its own."""
    global _in_progress
    if _in_progress:
        with contextlib.suppress(OSError):
            print(file=sys.stderr)
    _in_progress = False


def tell(text: str) -> None:
    """Print a result that lies in a file, too: who has it made may have gone, and it is made all the same."""
    with contextlib.suppress(OSError):
        print(text)
    _let_go()


class UserError(Exception):
    """What is wrong, where (file and line, or configuration path), and what to do about it."""


def first_line(error: BaseException) -> str:
    """The first line of what an error of a library says, or its type where it says nothing.

    NCCL says in the first line where it noticed something, and last what it was.
    """
    first, *others = str(error).strip().splitlines() or [type(error).__name__]
    if "Last error:" in others[:-1]:
        first += f": {others[others.index('Last error:') + 1]}"
    return first


def to_be_mended(error: BaseException) -> str:
    """What the user is told of an error that only they can mend; empty for any other one."""
    if isinstance(error, UserError):
        return str(error)
    if not isinstance(error, OSError):
        return ""
    if error.errno in NO_SPACE:
        said = f"cannot write {error.filename or 'the output'}: {NO_SPACE[error.errno]}; free some"
    elif error.errno in _NOT_ALLOWED and error.filename:
        said = f"{error.filename}: {_NOT_ALLOWED[error.errno]}; change that, or name another place,"
    else:
        return ""
    return f"{said} and run the same command again"


def run(main: Callable[[], int], *, may_pass: bool = False) -> None:
    """Run a script's `main` and leave with its exit status.

    A `UserError`, a full disk and a file that may not be read or written end in one line on standard error
    and status 1, an interrupt in status 130; anything else is our mistake and keeps its traceback. The line
    is noted for the executor, which then does not submit the job again, since the user must mend something
    first. A `UserError` is not noted where it `may_pass`, as an error of the network does. Where nobody reads
    the output any more, as after `| head`, the status is 141, and nothing is said.
    """
    speak_utf8()
    _open_streams()
    logger.setLevel(logging.INFO)
    _terminal.setLevel(logging.INFO)
    logger.addHandler(_terminal)
    logging.raiseExceptions = False  # a log that a full disk cannot take is no reason for a traceback
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files are removed
    try:
        status = main()
        sys.stdout.flush()
    except UserError as error:
        status = _complain(str(error), final=not may_pass)
    except BrokenPipeError:
        if not _is_abandoned(sys.stdout):
            raise
        status = 141
    except OSError as error:
        if not (said := to_be_mended(error)):
            raise
        status = _complain(said, final=True)
    except KeyboardInterrupt:
        status = 130
    finally:
        _let_go()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Python would print a traceback of what it runs at its end
    gc.freeze()  # else the interpreter would look at every object before it ends: 0.9 s after a training
    sys.exit(status)


def speak_utf8() -> None:
    """Begin this program anew with names of files and output in UTF-8, where the locale says otherwise.

    Python does so by itself in the locale C, unless PYTHONUTF8=0 is in the environment, and in no other one.
    """
    if sys.getfilesystemencoding() != "utf-8" and os.environ.get("PYTHONUTF8") != "1":
        environment = os.environ | {"PYTHONUTF8": "1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _open_streams() -> None:
    """Let what the caller has closed, as by `>&-`, lead nowhere.

    Python has None for it, and the next file that is opened would take its number, and what libraries print.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            nowhere = Path(os.devnull).open(mode, encoding="utf-8")  # noqa: SIM115 - open as long as the process is
            os.set_inheritable(nowhere.fileno(), True)
            setattr(sys, name, nowhere)


def _let_go() -> None:
    """Write what waits for standard output, or drop it: the interpreter would complain at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _is_abandoned(stream: TextIO) -> bool:
    """Whether it is a pipe or a socket whose reader has gone."""
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the option that every script has: --log-file."""
    made = argparse.ArgumentParser(description=description, allow_abbrev=False)
    made.add_argument(
        "--log-file",
        type=Path,
        action=_LogFile,
        metavar="FILE",
        help="write the log to this file, and only warnings to the terminal",
    )
    return made


class _LogFile(argparse.Action):
    """Begins the log when the option is read, so that it holds what goes wrong after that as well."""

    def __call__(self, _parser: Any, namespace: argparse.Namespace, value: Any, _option: Any = None) -> None:
        setattr(namespace, self.dest, value)
        begin_log(value)
        log_to(value)
        _terminal.setLevel(logging.WARNING)


def begin_log(path: Path) -> None:
    """Empty a log, and write to it which command writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(OSError):  # a full disk; `log_to` says what else is wrong with the file
        path.write_text(f"$ {shlex.join(['python', *sys.argv])}\n", encoding="utf-8")


def log_to(path: Path) -> None:
    """Let this process write its log to `path` as well, always at its end.

    A supervisor and the processes of its training write to one log. A process that kept a position of its
    own would write over the lines of the others.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, "a", encoding="utf-8", errors="surrogateescape")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)


def _complain(message: str, *, final: bool) -> int:
    logger.error("error: %s", message)
    if final and (record := os.environ.get(RECORD)):
        with contextlib.suppress(OSError):  # a full disk takes the name of the file, and no text
            Path(f"{record}.final").write_text(message, encoding="utf-8")
    return 1
