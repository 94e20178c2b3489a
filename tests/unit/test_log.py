"""How a script ends: its exit status, and what it says on standard error."""

from __future__ import annotations

import os
import pty
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from snaketron import files
from snaketron.log import first_line

import pytest

DOOR = "import errno, os, pathlib, signal, sys\nfrom snaketron import files\nfrom snaketron.log import *\n"
# Output is buffered. A module that is compiled under a limit would be left cut off, in the cache of all later
# processes.
ENVIRONMENT = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": ""}


def script(
    body: str, *arguments: Path, limit: int | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a script whose `main` is `body`; `limit` is the largest file that it may write, in bytes."""

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a background job of a shell begins without
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writes then fail with EFBIG
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code = f"{DOOR}def main():\n    {body}\nrun(main)"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, preexec_fn=prepare, capture_output=True, text=True, timeout=300, env=ENVIRONMENT | variables
    )


@pytest.mark.parametrize(
    ("body", "status", "stderr"),
    [
        ("return 0", 0, ""),
        ("return 3", 3, ""),
        ("logger.info('%d documents', 3); return 0", 0, "3 documents\n"),
        ("raise UserError('a.jsonl: line 3: no text')", 1, "error: a.jsonl: line 3: no text\n"),
        ("raise KeyboardInterrupt", 130, ""),
        ("os.kill(os.getpid(), signal.SIGINT)", 130, ""),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143, ""),
        # A signal that comes when all is done: what Python runs at its end goes on.
        ("import atexit; atexit.register(os.kill, os.getpid(), signal.SIGTERM); return 3", 3, ""),
        (
            "raise OSError(errno.ENOSPC, 'No space', 'a.bin')",
            1,
            "error: cannot write a.bin: no space left; free some and run the same command again\n",
        ),
        (
            "raise OSError(errno.EDQUOT, 'Quota', 'a.bin')",
            1,
            "error: cannot write a.bin: the disk quota is used up; "
            "free some and run the same command again\n",
        ),
        *(
            (
                f"raise OSError(errno.{name}, 'why', 'a.bin')",
                1,
                f"error: a.bin: {why}; change that, or name another place, and run the same command again\n",
            )
            for name, why in (
                ("EACCES", "permission denied"),
                ("EPERM", "not permitted"),
                ("EROFS", "the file system is read-only"),
            )
        ),
        (
            "raise OSError(errno.ENOSPC, 'No space')",
            1,
            "error: cannot write the output: no space left; free some and run the same command again\n",
        ),
    ],
)
def test_a_script_ends_as_it_says(body: str, status: int, stderr: str):
    done = script(body)
    assert (done.returncode, done.stderr) == (status, stderr)


@pytest.mark.parametrize("body", ["raise ValueError('ours')", "open('/nowhere/at/all')"])
def test_our_own_mistakes_keep_their_traceback(body: str):
    done = script(body)
    assert done.returncode == 1 and done.stderr.startswith("Traceback (most recent call last):")


def test_an_interrupt_while_a_program_imports_is_no_traceback():
    """A training imports for a second before it can obey Ctrl-C; a shell calls this end status 130."""
    code = "import snaketron, os, signal; os.kill(os.getpid(), signal.SIGINT)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_a_traceback_is_left_to_who_prints_tracebacks_here():
    """Such as a debugger, or what a system installs for all programs, before this package is imported."""
    code = "import sys; sys.excepthook = lambda *_: print('caught', file=sys.stderr); import snaketron; 1 / 0"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (1, "caught\n")


def test_other_libraries_speak_only_to_warn():
    body = "x = logging.getLogger('other'); x.info('chatter'); x.warning('news'); return 0"
    assert script(body).stderr == "news\n"


def test_a_file_that_the_disk_has_no_room_for_is_one_line_and_leaves_nothing(tmp_path: Path):
    body = "files.write_text(pathlib.Path(sys.argv[1]), b'x' * 10_000); return 0"
    done = script(body, tmp_path / "a", limit=1000)
    assert done.returncode == 1
    assert done.stderr == (
        f"error: cannot write {tmp_path}/a: file too large; free some and run the same command again\n"
    )
    assert list(tmp_path.iterdir()) == []
    assert script(body, tmp_path / "a").returncode == 0


def test_a_log_that_the_disk_has_no_room_for_does_not_stop_a_script():
    body = "log_to(pathlib.Path('/dev/full')); logger.info('3 documents'); return 0"
    done = script(body)
    assert (done.returncode, done.stderr) == (0, "3 documents\n")


def test_a_log_file_takes_what_is_said_and_the_terminal_only_warnings(tmp_path: Path):
    log = tmp_path / "logs/a.log"
    body = (
        "argument_parser('x').parse_args(['--log-file', sys.argv[1]]); "
        "logger.info('3 documents'); logger.warning('one is empty'); raise UserError('a.jsonl: line 3')"
    )
    done = script(body, log)
    assert (done.returncode, done.stderr) == (1, "one is empty\nerror: a.jsonl: line 3\n")
    command, *lines = log.read_text().splitlines()
    assert command == f"$ python -c {log}"
    # After the date and the time of each line.
    assert [line.split(" ", 2)[2] for line in lines] == [
        "3 documents",
        "one is empty",
        "error: a.jsonl: line 3",
    ]
    assert (
        script("argument_parser('x').parse_args(['--log-file', sys.argv[1]]); return 0", log).returncode == 0
    )
    assert log.read_text() == f"{command}\n"  # of the last attempt


def test_a_locale_without_a_character_loses_no_text(tmp_path: Path):
    """Names of files, the log and the output are UTF-8; SFT prints its summary after all its steps."""
    log, named = tmp_path / "übung/log", tmp_path / "named"
    said = "log, named = map(pathlib.Path, sys.argv[1:]); begin_log(log); log_to(log);"
    said += (
        " files.write_json(named, str(log)); logger.info('\\xfcbung \\u65e5'); print('\\xfcbung \\u65e5');"
    )
    done = script(f"{said} return 0", log, named, LC_ALL="C", PYTHONUTF8="0")
    assert (done.returncode, done.stdout) == (0, "übung 日\n"), done.stderr
    assert files.read_json(named) == str(log)
    assert log.read_text(encoding="utf-8").endswith(" übung 日\n")


def test_processes_that_write_to_one_log_do_not_write_over_each_other(tmp_path: Path):
    """A supervisor begins the log, its processes write to it, and the supervisor has the last word."""
    log, process = tmp_path / "a.log", tmp_path / "process.py"
    process.write_text(
        f"{DOOR}logger.setLevel('INFO'); log_to(pathlib.Path(sys.argv[1])); logger.info('of a process')"
    )
    body = (
        "begin_log(pathlib.Path(sys.argv[1])); log_to(pathlib.Path(sys.argv[1])); logger.info('first'); "
        "import subprocess; subprocess.run([sys.executable, sys.argv[2], sys.argv[1]], check=True); "
        "logger.info('last'); return 0"
    )
    script(body, log, process)
    said = [line.split(" ", 2)[2] for line in log.read_text().splitlines()[1:]]
    assert said == ["first", "of a process", "last"]


def test_an_ended_script_removes_what_it_was_writing(tmp_path: Path):
    body = (
        "with files.writing(pathlib.Path(sys.argv[1])) as (path,):\n"
        "        path.write_text('half'); os.kill(os.getpid(), signal.SIGTERM)"
    )
    assert script(body, tmp_path / "a").returncode == 143
    assert list(tmp_path.iterdir()) == []


def test_progress_is_not_written_to_the_file_that_a_live_view_reads():
    """Another standard error, as that of a job on a cluster that got the variable too, has it."""
    said = "import sys; show_progress('step 1/2'); return 0"
    assert script(said).stderr == "step 1/2\n"
    assert script(f"os.environ[SHOWN] = '1:1'; {said}").stderr == "step 1/2\n"
    assert script(f"import sys; os.environ[SHOWN] = name_of(sys.stderr); {said}").stderr == ""


def unread(body: str, kind: str = "pipe") -> tuple[int, str]:
    """The status of a script whose output nobody reads any more, and what it says."""
    if kind == "pipe":
        reading, writing = os.pipe()
    else:
        reading, writing = (end.detach() for end in socket.socketpair())
    os.close(reading)
    code = f"{DOOR}def main():\n    {body}\nrun(main)"
    command = [sys.executable, "-c", code]
    ended = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=300, env=ENVIRONMENT
    )
    os.close(writing)
    return ended.returncode, ended.stderr


@pytest.mark.parametrize("kind", ["pipe", "socket"])
@pytest.mark.parametrize("lines", [1, 100_000])  # that wait in the buffer, and that do not
def test_a_reader_that_has_seen_enough_ends_the_script_without_a_word(lines: int, kind: str):
    assert unread(f"print('line\\n' * {lines}); return 0", kind) == (141, "")


@pytest.mark.parametrize(
    ("end", "status", "stderr"),
    [
        ("raise UserError('no corpus')", 1, "error: no corpus\n"),
        ("raise KeyboardInterrupt", 130, ""),
        ("os.kill(os.getpid(), signal.SIGTERM)", 143, ""),
    ],
)
def test_output_that_nobody_reads_does_not_change_how_a_script_ends(end: str, status: int, stderr: str):
    assert unread(f"print('line'); {end}") == (status, stderr)


def test_output_that_the_disk_has_no_room_for_is_one_line():
    ended = script("os.dup2(os.open('/dev/full', os.O_WRONLY), 1); print('line'); return 0")
    said = "error: cannot write the output: no space left; free some and run the same command again\n"
    assert (ended.returncode, ended.stderr) == (1, said)


@pytest.mark.parametrize(
    ("end", "status", "stderr"),
    [
        ("return 0", 0, ""),
        ("raise UserError('no corpus')", 1, "error: no corpus\n"),
        ("raise BrokenPipeError('a pipe of ours')", 1, "BrokenPipeError: a pipe of ours\n"),
    ],
)
def test_a_script_may_run_without_standard_output(end: str, status: int, stderr: str):
    code = f"{DOOR}def main():\n    print('line'); {end}\nrun(main)"
    closed = [shutil.which("sh"), "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", code]
    ended = subprocess.run(closed, stderr=subprocess.PIPE, text=True, timeout=300)
    assert ended.returncode == status and ended.stderr.endswith(stderr)
    assert "AttributeError" not in ended.stderr


def test_a_stream_that_is_closed_leads_nowhere():
    """Else the first file that a program opens would be its standard error."""
    body = "file = open(os.devnull); os.write(1, b'said' * (file.fileno() > 2)); return 0"
    code = f"{DOOR}def main():\n    sys.stderr.write('x'); {body}\nrun(main)"
    closed = [shutil.which("sh"), "-c", 'exec "$@" <&- 2>&-', "sh", sys.executable, "-c", code]
    ended = subprocess.run(closed, stdout=subprocess.PIPE, text=True, timeout=300)
    assert (ended.returncode, ended.stdout) == (0, "said")


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_and_results_that_nobody_sees_stop_no_program(terminal: bool):
    """The terminal of a run that `disown` has left in the background is gone, and `head` reads no more."""
    reading, writing = pty.openpty() if terminal else os.pipe()
    os.close(reading)
    progress = "show_progress('step 1/2'); logger.info('saved'); show_progress('step 2/2')"
    body = f"{progress}; tell('result' * 9999); return 0"
    code = f"{DOOR}def main():\n    {body}\nrun(main)"
    ended = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=writing, timeout=300)
    os.close(writing)
    assert ended.returncode == 0


def test_another_broken_pipe_is_our_mistake():
    ended = script("raise BrokenPipeError('a pipe of ours')")
    assert ended.returncode == 1 and ended.stderr.endswith("BrokenPipeError: a pipe of ours\n")


def test_of_an_error_of_nccl_the_line_says_what_it_was():
    """It is the last of several lines; the first says where NCCL noticed it."""
    first = "NCCL error in: NCCLUtils.cpp:94, unhandled system error, NCCL version 2.28.9"
    said = (
        f"{first}\nncclSystemError: System call failed. \nLast error:\nError while creating shared memory\n"
    )
    assert first_line(RuntimeError(said)) == f"{first}: Error while creating shared memory"
    assert first_line(RuntimeError(f"{first}\nLast error:")) == first
    assert first_line(RuntimeError("CUDA error: unspecified\nSearch for it")) == "CUDA error: unspecified"
    assert first_line(KeyError()) == "KeyError"
