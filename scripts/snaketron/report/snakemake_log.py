"""What Snakemake's log says so far."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from dataclasses import dataclass, field

from snaketron.wording import DURATIONS, FACTORS, THOUSANDS

UNITS = {"": 1.0, **dict(zip(THOUSANDS, FACTORS, strict=True))}  # of `wording.large`
# Lines of `graph.outlook`, which the log has of each training that a run contains.
TRAINING = re.compile(r"(pretrain/\w+|sft|lora\w*) +(trains|continues|was trained|was merged|adds) ?(.*)")
JOB = re.compile(r"( *)(?:local)?(?:rule|checkpoint) (\w+):$")
FIELD = re.compile(r" +(output|log|jobid|wildcards): (.*)")
FINISHED = re.compile(r"Finished jobid: (\d+)")
SUBMITTED = re.compile(r"Job (\S+) has been submitted with SLURM jobid (\S+) \(log: ")
TIME = re.compile(r" *\[(\w{3} \w{3} [ \d]\d [\d:]{8} \d{4})\](.*)")
REFUSED = "Another Snakemake is running in this directory"


@dataclass
class Job:
    """A job that Snakemake has started or submitted."""

    number: str
    rule: str
    began: float  # seconds since the epoch
    wildcards: str = ""
    output: str = ""  # the first file of it
    log: str = ""
    slurm: str = ""  # number of its Slurm job
    state: str = "running"  # finished, failed, stopped

    @property
    def title(self) -> str:
        return f"{self.rule} {self.wildcards}".strip()


@dataclass(frozen=True)
class Planned:
    """A training of a run, as the run said it before its first job."""

    steps: int = 0  # 0 where nothing is trained
    done: int = 0  # steps that are not trained again
    tokens: float | None = None  # to be trained
    seconds: float | None = None  # the estimate


@dataclass
class Log:
    """What Snakemake's log says of a run.

    The words are those of Snakemake 9.27.1 and of `graph.outlook`; tests read logs that both wrote.
    """

    totals: dict[str, int] = field(default_factory=dict)  # jobs of each rule
    jobs: dict[str, Job] = field(default_factory=dict)  # by number
    trainings: dict[str, Planned] = field(default_factory=dict)  # by name
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # of jobs, by rule
    began: float | None = None
    now: float = 0.0  # of the last line with a time
    stopping: bool = False  # as the user asked
    refused: bool = False  # as another Snakemake was running
    # Where the reader is: in the table, in what is told of a job, an error or a group, in the log of a job.
    _table: bool = False
    _rule: str = ""
    _output: str = ""
    _log: str = ""
    _grouped: bool = False
    _error: bool = False
    _job: Job | None = None
    _group: list[Job] = field(default_factory=list)
    _end: str | None = ""  # the line that ends the log of a failed job; None before its first line

    def read(self, line: str) -> None:
        if self._end != "":  # in the log of a failed job, where another Snakemake may speak of its jobs
            self._end = line if self._end is None else "" if line == self._end else self._end
        elif found := TIME.match(line):
            self.now = time.mktime(time.strptime(found[1], "%a %b %d %H:%M:%S %Y"))
            if "Group job " in found[2]:
                self._group, self._error = [], False
        elif line.startswith("  Date: "):
            self.began = time.mktime(time.strptime(line.strip(), "Date: %Y-%m-%d %H:%M:%S"))
        elif self._table or line == "Job stats:":
            self._read_table(line)
        elif line.startswith(" "):
            self._read_job(line)
        elif line:
            self._read_message(line)

    def _read_table(self, line: str) -> None:
        """A row of the table of jobs, which an empty line ends."""
        self._table = bool(line)
        name, _, count = line.partition(" ")
        if count.strip().isdigit() and name != "total":
            self.totals[name] = int(count)

    def _read_job(self, line: str) -> None:
        if found := JOB.match(line):
            self._begin(found[2], grouped=len(found[1]) == 4)
            self._error = self._error or len(found[1]) > 4  # members of a group that failed
        elif found := FIELD.match(line):
            self._read_field(found[1], found[2])

    def _begin(self, rule: str, *, grouped: bool = False) -> None:
        self._rule, self._job, self._error = rule, None, self._error and grouped
        self._output, self._log, self._grouped = "", "", grouped

    def _read_field(self, name: str, value: str) -> None:
        if name == "output":
            self._output = value.partition(",")[0].partition(" (")[0]
        elif name == "log":
            self._log = value
        elif name == "wildcards" and self._job:
            self._job.wildcards = " ".join(part.partition("=")[2] for part in value.split(", "))
        elif name == "jobid" and self._rule:
            if self._error:
                if job := self.jobs.get(value):
                    job.state = "stopped" if self.stopping else "failed"
                return
            self._job = self.jobs[value] = Job(
                value, self._rule, self.now, output=self._output, log=self._log
            )
            if self._grouped:
                self._group.append(self._job)

    def _read_message(self, line: str) -> None:
        if found := JOB.match(line):
            self._error = False
            self._begin(found[2])
        elif line.startswith("Error in "):
            self._begin(line.removeprefix("Error in ").partition(" ")[2].rstrip(":"))
            self._error = True
        elif (found := FINISHED.match(line)) and (job := self.jobs.get(found[1])):
            job.state = "finished"
            self.seconds[job.rule].append(self.now - job.began)
        elif found := SUBMITTED.match(line):
            alone = self.jobs.get(found[1])
            for job in [alone] if alone else self._group:
                job.slurm = found[2]
            self._group = self._group if alone else []
        elif found := TRAINING.match(line):
            self.trainings[found[1]] = planned(found[2], found[3])
        elif line.startswith("Terminating processes on user request"):
            self.stopping = True
        elif line.startswith("Logfile ") and line.endswith(":"):
            self._end = None
        elif REFUSED in line:
            self.refused = True


def planned(verb: str, words: str) -> Planned:
    """What `sizes.outlook.outlook` says, as numbers.

    >>> planned("continues", "after step 20 of 80, about 10.0 min")
    Planned(steps=80, done=20, tokens=None, seconds=600.0)
    """
    if verb not in ("trains", "continues"):
        return Planned()
    about = re.search(rf"about ([\d.,]+) ({'|'.join(DURATIONS)})\b", words)
    seconds = _number(about[1]) * DURATIONS[about[2]] if about else None
    if found := re.match(r"(?:at|after) step ([\d,]+) of ([\d,]+)", words):
        return Planned(int(_number(found[2])), int(_number(found[1])), None, seconds)
    if found := re.match(r"([\d,]+) steps, ([\d.,]+) ?([kMBT]?) tokens", words):
        return Planned(int(_number(found[1])), 0, _number(found[2]) * UNITS[found[3]], seconds)
    return Planned(seconds=seconds)


def _number(text: str) -> float:
    return float(text.replace(",", ""))
