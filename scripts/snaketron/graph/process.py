"""The process of Snakemake: where it may run, one at a time, what its commands find, and how it ends."""

from __future__ import annotations

import atexit
import contextlib
import getpass
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TextIO

from snaketron import files

LOCK = Path(".snakemake/snaketron.lock")  # that a run holds in its directory
TEMPORARY = 1_000_000  # bytes; the copies of the rules have 70,000

_held: list[TextIO] = []  # open for the life of the process
_interrupts: list[int] = []  # signals that came
_put_off = False  # whether they have to wait


def hold(path: Path) -> bool:
    """Try to own `path` until this process ends, however it ends; False if another process owns it.

    Snakemake's own lock is a file that stays after SIGKILL and asks for `--unlock`; the profiles turn
    it off in favour of this one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", encoding="utf-8")
    if not files.lock(file):
        file.close()
        return False
    _held.append(file)
    return True


def is_running(directory: Path) -> bool:
    """Whether a Snakemake runs in a directory."""
    return files.is_locked(directory / LOCK)


def elsewhere(repository: Path) -> str | None:
    """What to do where the working directory is not that of the workflow; None where it is.

    Rules call scripts/, and the configuration names its files, from the working directory. A directory with
    links to both is one as well.
    """
    if Path("scripts/snaketron").is_dir() and Path("config/config.yaml").is_file():
        return None
    repository = repository.resolve()
    return (
        f"Run the workflow in its own directory, and without --directory: cd {shlex.quote(str(repository))}. "
        f"`pathvars` puts results elsewhere. To run in {Path.cwd()}, link the workflow into it: "
        f"ln -s {shlex.quote(str(repository))}/{{config,scripts}} ."
    )


def mixed(package: Path = Path(files.__file__).parent) -> str | None:
    """What to do where this process has imported another state of the package than the jobs will.

    Jobs take that of scripts/ in the working directory. The environment of another clone has the package of
    that clone, and PYTHONPATH may name one.
    """
    own = Path("scripts/snaketron").resolve()
    if package.resolve() == own or _sources(package) == _sources(own):
        return None
    return (
        f"Snakemake has imported {package}, which differs from {own}, with which the jobs would run; take "
        "the environment of this workflow, without PYTHONPATH: "
        f"cd {shlex.quote(str(own.parent.parent))} && uv sync"
    )


def _sources(package: Path) -> dict[Path, bytes]:
    return {path.relative_to(package): path.read_bytes() for path in package.rglob("*.py")}


def unwritable() -> str | None:
    """What to do where Snakemake cannot keep its notes, as a dry-run does too; None where it can."""
    for place in (Path(".snakemake"), Path()):
        if place.exists() and not os.access(place, os.W_OK):
            return (
                f"{place.absolute()} cannot be written, and Snakemake keeps notes there, in a dry-run too; "
                "change that, or run in a copy"
            )
    return None


def cramped() -> str | None:
    """What to do where the directory for temporary files is full; None where it is not.

    Snakemake writes copies of the rules to it, and each choice of the next jobs, and does not say where.
    """
    place = os.environ.get("TMPDIR") or tempfile.gettempdir()
    if Path(place).is_dir() and (why := files.no_room(Path(place), TEMPORARY)):
        return (
            f"{place}: {why}, and Snakemake writes temporary files there; free some, or name another place "
            "in TMPDIR"
        )
    return None


def find_python() -> None:
    """Let the commands of rules find the programs of this environment, activated or not."""
    here = Path(sys.executable).parent
    found = shutil.which("python")
    if found is None or Path(found).parent != here:
        os.environ["PATH"] = f"{here}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def name_user() -> None:
    """Call a user who has no name, as in a container, by number: Snakemake and torch ask for a name."""
    try:
        getpass.getuser()
    except (KeyError, OSError):  # the latter from Python 3.13 on
        os.environ["USER"] = str(os.getuid())


def obey_interrupts() -> None:
    """Let SIGINT stop this process, as Ctrl-C does, also where a script started it with `&`.

    A shell without job control lets such a process ignore SIGINT, and Python then leaves it at that.
    """
    signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Stop. Pressed again, Ctrl-C is for the jobs, which get it too: Snakemake waits for their end."""
    _interrupts.append(number)
    if not _put_off and not isinstance(sys.exception(), KeyboardInterrupt):
        signal.default_int_handler(number, frame)


@contextlib.contextmanager
def interrupts_put_off() -> Iterator[None]:
    """Have SIGINT stop this process at the end of the block, and not within it."""
    global _put_off
    before, _put_off = len(_interrupts), True
    try:
        yield
    finally:
        _put_off = False
    if len(_interrupts) > before:
        raise KeyboardInterrupt


def interrupted() -> bool:
    """Whether SIGINT has come, to this process and its jobs."""
    return bool(_interrupts)


def leave_interrupts() -> None:
    """Take no notice of SIGINT when no job is left to stop: this process is about to end."""
    signal.signal(signal.SIGINT, lambda *_: None)


def at_end(*explain: Callable[[], None]) -> None:
    """Call these at the end of this process: Snakemake has no hook for the end of a dry-run.

    Ctrl-C ends it as anywhere else. Python would complain of it at this point, and go on.
    """

    def explain_all() -> None:
        try:
            for one in explain:
                one()
        except KeyboardInterrupt:
            sys.stderr.flush()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        leave_interrupts()

    atexit.register(explain_all)


def ending(workflow: Any) -> tuple[Literal["failed", "stopped"], list[str]]:
    """How a run that has not finished ended, and the jobs that failed, as "tokenize_shard docs part_1"."""
    scheduler = workflow.scheduler
    if interrupted() or scheduler is None or scheduler._user_kill:  # the last by SIGTERM
        return "stopped", []
    jobs = [one for job in scheduler.failed for one in (job.jobs if job.is_group() else [job])]
    return "failed", sorted(" ".join([job.rule.name, *job.wildcards_dict.values()]) for job in jobs)
