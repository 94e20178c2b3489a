"""What happens in a run, a line of JSON for each event: the live view and the page follow it."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snaketron.files import write_text
from snaketron.graph.stops import Stops
from snaketron.jobs.lines import Tail
from snaketron.sizes.outlook import Planned

import orjson
from snakemake_interface_logger_plugins.common import LogEvent

JOURNAL = Path(".snakemake/snaketron.journal")

# Words of the executor for Slurm.
SUBMITTED = re.compile(r"Job (\S+) has been submitted with SLURM jobid (\S+) \(log: (.*)\)\.")


class Writer(logging.Handler):
    """Writes what Snakemake tells of the jobs of a run, in the place of the journal of an earlier one."""

    def __init__(
        self, directory: Path, totals: Mapping[str, int], trainings: Mapping[str, Planned], stops: Stops
    ) -> None:
        """`totals` has the jobs of each rule and of all, and `trainings` what each of them will do."""
        super().__init__()
        path, before = directory / JOURNAL, Journal(directory)
        before.look()
        self.groups: dict[str, list[str]] = {}  # numbers of the jobs of a group, by the ids that it may have
        self.stops = stops
        begins = {"totals": totals, "trainings": trainings, "left": before.ends()}
        write_text(path, _line(time.time(), begins))
        self.file = path.open("ab", buffering=0)
        self.cut = False  # whether the last line is, by a full disk

    def emit(self, record: logging.LogRecord) -> None:
        if said := self._said(record):
            line = b"\n" * self.cut + _line(record.created, said)
            with contextlib.suppress(OSError):  # a full disk is no reason to end the run
                self.cut = self.file.write(line) < len(line)

    def _said(self, record: logging.LogRecord) -> dict[str, Any] | None:
        """What a record of Snakemake tells of jobs; None where that is nothing."""
        said = record.__dict__
        match said.get("event"):
            case LogEvent.JOB_INFO:
                output, log = (next(iter(said[name]), "") for name in ("output", "log"))
                job = {"rule": said["rule_name"], "wildcards": " ".join(said["wildcards"].values())}
                job |= {"output": output.partition(" (")[0], "log": log}  # without Snakemake's marks
                return {"begins": str(said["jobid"]), "job": job}
            case LogEvent.JOB_FINISHED:
                return {"finished": str(said["job_id"])}
            case LogEvent.JOB_ERROR:
                state = "stopped" if self.stops.has_stopped(said) else "failed"
                return {"ended": [str(said["jobid"])], "state": state}
            case LogEvent.GROUP_ERROR:
                numbers = [str(one["jobid"]) for one in said["job_error_info"]]
                return {"ended": numbers, "state": "stopped" if self.stops.asked else "failed"}
            case LogEvent.GROUP_INFO:
                numbers = [str(job.jobid) for job in said["jobs"]]
                self.groups |= {job.uuid(): numbers for job in said["jobs"]}
            case None if found := SUBMITTED.fullmatch(record.getMessage()):
                return {"submitted": self.groups.get(found[1], [found[1]]), "slurm": found[2]}
            case None | LogEvent.ERROR:
                self.stops.hear(record.getMessage())
        return None


def _line(at: float, said: Mapping[str, Any]) -> bytes:
    return orjson.dumps({"at": at, **said}) + b"\n"


@dataclass
class Job:
    """A job that Snakemake has started or submitted."""

    began: float  # seconds since the epoch
    rule: str
    wildcards: str = ""
    output: str = ""  # the first file of it
    log: str = ""
    slurm: str = ""  # number of its Slurm job
    state: str = "running"  # finished, failed, stopped

    @property
    def title(self) -> str:
        return f"{self.rule} {self.wildcards}".strip()


class Journal:
    """What has happened so far in the run that began last in a directory, as of the last `look`."""

    def __init__(self, directory: Path) -> None:
        self._tail = Tail(directory / JOURNAL)
        self._begin(0.0)

    def _begin(self, at: float) -> None:
        self.began = self.now = at  # the latter is the time of the last event
        self.totals: dict[str, int] = {}  # jobs of each rule; empty where nothing has run
        self.trainings: dict[str, Planned] = {}  # by name
        self.jobs: dict[str, Job] = {}  # by number
        self.left: dict[str, str] = {}  # how jobs of earlier runs ended that did not finish, by their logs
        self.seconds: dict[str, list[float]] = defaultdict(list)  # of jobs, by rule

    def look(self) -> None:
        self._tail.changed()  # another run has begun
        for line in self._tail.lines():
            # A full disk has cut the line off, or another version has written it.
            with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError):
                self._add(orjson.loads(line))

    def ends(self, *, running: bool = False) -> dict[str, str]:
        """How each job that did not finish ended, by its log.

        One of whose end nobody has told runs, where a Snakemake does, or was stopped with its Snakemake.
        """
        states = self.left | {job.log: job.state for job in self.jobs.values()}
        others = ("finished", "running") if running else ("finished",)
        return {
            log: "stopped" if state == "running" else state
            for log, state in states.items()
            if log and state not in others
        }

    def _add(self, said: dict[str, Any]) -> None:
        self.now = said["at"]
        match said:
            case {"totals": totals, "trainings": trainings}:
                self._begin(self.now)
                self.totals = {rule: count for rule, count in totals.items() if rule != "total"}
                self.trainings = {name: Planned(**one) for name, one in trainings.items()}
                self.left = said.get("left", {})
            case {"begins": number, "job": job}:
                self.jobs[number] = Job(self.now, **job)
            case {"finished": number} if job := self.jobs.get(number):
                job.state = "finished"
                self.seconds[job.rule].append(self.now - job.began)
            case {"ended": numbers, "state": state}:
                for job in filter(None, map(self.jobs.get, numbers)):
                    job.state = state
            case {"submitted": numbers, "slurm": slurm}:
                for job in filter(None, map(self.jobs.get, numbers)):
                    job.slurm = slurm
