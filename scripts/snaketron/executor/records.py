"""What the jobs of a run say of themselves, in a directory that they share with Snakemake.

Slurm forgets a job some time after its end (MinJobAge, 60 s at many sites), and without accounting nobody
remembers it. So each job notes that it began and how it ended (`record.sh`), and a program in it notes an
error that another try would meet again (`snaketron.log`).
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_REQUEUES = 3  # of a job that is no training: the default of max_restarts
SCRIPT = Path(__file__).with_name("record.sh")
COMMAND = "job_runs"  # what stands before the command of a job
# How Slurm writes into the log of a job why it ends it.
_ENDED = re.compile(r"\*\*\* (?:JOB|STEP) .* CANCELLED AT \S+(?: DUE TO ([A-Z ]+))?")


@dataclass
class Record:
    """What a job said about the last time that it ran."""

    restarts: int = 0  # how often it was requeued before
    status: int | None = None  # of its command; None while it runs, and where it was killed
    final: str | None = None  # an error that another try would meet again; "" where the disk took no text


class Records:
    """The records of one run of Snakemake, in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def before(self, *, bounded: bool, step: str = "") -> str:
        """What the shell of a job does first; a `bounded` one gives up after `MAX_REQUEUES`.

        `step` are options of srun for the command, which follows `COMMAND`.
        """
        limit = f"export JOB_REQUEUES={MAX_REQUEUES} && " if bounded else ""
        options = f"JOB_STEP={shlex.quote(step)} && " if step else ""
        return (
            f"{limit}{options}export JOB_RECORDS={shlex.quote(str(self.directory))}"
            f" && . {shlex.quote(str(SCRIPT))}"
        )

    @property
    def after(self) -> str:
        """What it does last: this follows the command and `&&`."""
        return "job_ended || job_ended"

    def read(self) -> dict[str, Record]:
        """The records by the number of the job; of jobs that have begun."""
        found: dict[str, Record] = {}
        for job, restarts, kind, rest in self._files():
            record = found.setdefault(job, Record(restarts))
            if restarts > record.restarts:
                record = found[job] = Record(restarts)
            if restarts < record.restarts:
                continue  # it runs again, or has run again
            if kind == "exit":
                record.status = int(rest)
            elif kind == "final":
                record.final = self._text(f"{job}.{restarts}.final")
        return found

    def forget(self, job: str) -> None:
        """Delete the record of a job."""
        with contextlib.suppress(OSError):
            for path in self.directory.glob(f"{job}.*"):
                path.unlink(missing_ok=True)

    def _files(self) -> Iterator[tuple[str, int, str, str]]:
        with contextlib.suppress(OSError):  # the file system is away; the next look tells
            for path in sorted(self.directory.iterdir()):
                if match := re.fullmatch(r"(\d+)\.(\d+)\.(began|exit|final)\.?(\d*)", path.name):
                    yield match[1], int(match[2]), match[3], match[4]

    def _text(self, name: str) -> str:
        try:
            return (self.directory / name).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""


def why_in_log(log: Path) -> str | None:
    """Why Slurm ended a job, as it wrote into the log of the job: "TIME LIMIT", say, or "" for no reason.

    None where it wrote nothing. Only the end of the log is read.
    """
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 100_000))
            found = _ENDED.findall(file.read().decode(errors="replace"))
    except OSError:
        return None
    return found[-1].strip() if found else None
