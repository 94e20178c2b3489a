"""What a run says: a line for each job that starts or ends, and for a failed one the end of its log.

Snakemake gives each job ten lines, with its parameters twice when it fails. They stay in the log below
.snakemake/log, and a rule's own log begins with its command.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from logging import LogRecord
from typing import Any

from snaketron.graph import process
from snaketron.graph.journal import SUBMITTED
from snaketron.graph.stops import STATUS, TERMINATING, Stops, end_of
from snaketron.wording import duration, plural, shortened

from snakemake_interface_logger_plugins.common import LogEvent

LONGEST = 160  # characters of a reason
# Beginnings of messages that tell a user of this workflow nothing.
CHATTER = (
    *("Config file ", "Assuming unrestricted shared", "Using shell", "Select jobs to"),
    *("Singularity containers: ignored", "Conda environments: ignored", "Group jobs: inactive"),
    *("Shutting down", "Exiting because a job execution failed"),
    *("Removing output files of", "This was a dry-run", "Some jobs were triggered by provenance"),
    *("Rules with provenance triggered", "Reasons:\n", "SLURM run ID", "Job rate limit reached"),
)
INCOMPLETE = ("Forced execution", "Asked for, or not completed the last time")  # Snakemake does not say which
FAILED = "At least one job did not complete successfully."
# An error that the Snakefile or an input function raises, and Snakemake's lines about where that is.
RAISED = re.compile(
    r'WorkflowError(?: in file ".*/Snakefile", line \d+)?:\n(.+?)(?:\n  File ".*", line \d+, in .+)*',
    re.DOTALL,
)
UNKNOWN = re.compile(r"(\d+) jobs have missing provenance/metadata [^\n]*\n[^\n]*metadata: (.+)")
AGAIN = re.compile(r"Trying to restart job (\S+)\.")


def without_notes(number: int, rules: str) -> str:
    """A warning of finished jobs for which no changed key is noticed."""
    return (
        f"Of {plural(number, 'finished job')} ({rules}) Snakemake has no notes, as in a copy without "
        ".snakemake: keys that were changed since do not make them run again; -R RULE does"
    )


@dataclass
class Job:
    """A job as the lines call it."""

    title: str
    began: float


@dataclass
class Lines:
    """The words for each message of Snakemake; None where there is nothing to say."""

    dryrun: bool = False
    jobs: dict[Any, Job] = field(default_factory=dict)  # by number
    stops: Stops = field(default_factory=lambda: Stops(process.interrupted))
    failed: list[str] = field(default_factory=list)
    groups: dict[str, set[str]] = field(default_factory=dict)  # of groups that failed, the jobs to be done
    total: int = 0
    done: int = 0
    stopped: bool = False  # whether a job has, or no further one begins
    groups_of: dict[str, str] = field(default_factory=dict)  # the groups of jobs by the ids of their members
    full_log: str = ""

    def of(self, record: LogRecord) -> str | None:
        match getattr(record, "event", None):
            case LogEvent.RUN_INFO:
                return self._run(record)
            case LogEvent.GROUP_INFO:
                return self._group(record)
            case LogEvent.JOB_INFO:
                return self._begins(record)
            case LogEvent.JOB_FINISHED:
                return self._finished(record)
            case LogEvent.JOB_ERROR:
                return self._fails(record)
            case LogEvent.GROUP_ERROR:
                return self._group_fails(record)
            case None | LogEvent.ERROR:
                return self._message(record.getMessage())
            case _:
                return None

    # --------------------------------------------------------------------------------------------- jobs

    def _run(self, record: LogRecord) -> str | None:
        """The table of jobs, once."""
        first, self.total = not self.total, record.__dict__["stats"].get("total", 0)
        return record.getMessage().rstrip() if first else None

    def _begins(self, record: LogRecord) -> str | None:
        said = record.__dict__
        job = Job(" ".join([said["rule_name"], *map(str, said["wildcards"].values())]), time.monotonic())
        self.jobs[said["jobid"]] = job
        if self.dryrun:
            return f"{job.title}: {_cut(said['reason'].replace(*INCOMPLETE))}"
        # Elsewhere the line comes when the job is submitted, with its number there; a group has one line.
        return _at(f"{job.title} starts") if said["local"] and not said["indent"] else None

    def _group(self, record: LogRecord) -> str | None:
        jobs = record.__dict__["jobs"]
        title = group_title(job.rule.name for job in jobs)
        if self.dryrun:
            return f"{title}:"
        # All groups are named before the first is submitted, as a job with the id of one of its members.
        self.groups_of.update((job.uuid(), title) for job in jobs)
        return None

    def _finished(self, record: LogRecord) -> str:
        job = self._job(record.__dict__["job_id"])
        self.done += 1
        for members in self.groups.values():
            members.discard(job.title)
        done = {job.title, *(title for title, members in self.groups.items() if not members)}
        self.failed = [title for title in self.failed if title not in done]  # at an earlier try
        took = duration(time.monotonic() - job.began)
        return _at(f"{job.title} is done after {took} ({self.done} of {self.total})")

    def _fails(self, record: LogRecord) -> str | None:
        """A stop in one line; else the reason, the end of the log, and where to read on."""
        said = record.__dict__
        job, logs = self._job(said["jobid"], said["rule_name"]), said["log"]
        if self.stops.has_stopped(said):
            self.stopped = True
            return _at(f"{job.title} has stopped")
        status, end = self.stops.status(said["shellcmd"]), end_of(logs)
        if said["indent"] and not any(map(_complains, end)):
            return None  # a member of a failed group that did not fail itself
        self.failed.append(job.title)
        why = f": {said['rule_msg']}" if said["rule_msg"] else ""
        lines = [_at(f"{job.title} has failed{f' (exit status {status})' if status else ''}{why}")]
        lines += [f"  | {line}" for line in end]
        lines += [f"  Its log, which begins with its command: {log}" for log in logs[:1]]
        lines += [f"  {name}: {value}" for name, value in said["aux"].items() if str(value) not in why]
        return "\n".join((*lines, *(f"  Log of its Slurm job: {log}" for log in logs[1:])))

    def _group_fails(self, record: LogRecord) -> str:
        """The line of the group; lines of the members that failed follow."""
        said = record.__dict__
        title = group_title(member["rule_name"] for member in said["job_error_info"])
        if self.stops.asked:
            self.stopped = True
            return _at(f"{title} has stopped")
        self.failed.append(title)
        members = {self._job(member.get("jobid"), title).title for member in said["job_error_info"]}
        self.groups.setdefault(title, set()).update(members)
        # The executor of this workflow says why.
        why = f", {_cut(said['rule_msg'])}" if said.get("rule_msg") else ""
        logs = [f"  Log of its Slurm job: {log}" for log in said["aux_logs"]]
        return "\n".join((_at(f"{title} has failed{why}"), *logs))

    def _job(self, number: Any, rule: str = "a job") -> Job:
        return self.jobs.get(number) or Job(rule, time.monotonic())

    # ----------------------------------------------------------------------------------------- messages

    def _message(self, text: str) -> str | None:
        self.stops.hear(text)
        if text.startswith("Will exit after finishing"):  # SIGTERM came; said again after each job
            first, self.stopped = not self.stopped, True
            return _at("Stopping, as asked, when the jobs that run have ended") if first else None
        if text.startswith(CHATTER):
            return None
        if found := UNKNOWN.match(text):
            return without_notes(int(found[1]), found[2])
        if "CalledProcessError" in text and STATUS.search(text):
            return None
        if text.startswith(TERMINATING):
            return _at("Stopping, as asked")
        if text.startswith("Complete log(s): "):
            self.full_log = text.removeprefix("Complete log(s): ")
            return None
        if text.startswith("Elapsed time: "):
            took = text.removeprefix("Elapsed time: ").partition(".")[0]
            return f"All jobs are done, after {took}." if self.done == self.total else None
        if text.rstrip().endswith(FAILED):
            return self._ending()
        if found := RAISED.fullmatch(text):
            return f"error: {found[1]}"
        if found := SUBMITTED.fullmatch(text):
            return _at(f"{self._named(found[1])} is submitted as Slurm job {found[2]}")
        if found := AGAIN.fullmatch(text):
            return _at(f"{self._named(found[1])} is tried again")
        return text

    def _named(self, number: str) -> str:
        """The title of a job, or of a group, by the number or the id in a message."""
        return self._job(_number(number), self.groups_of.get(number, "a group of jobs")).title

    def _ending(self) -> str:
        done = f"{self.done} of {self.total} jobs are done"
        if not self.failed and (self.stops.asked or self.stopped):
            return f"Stopped; {done}. Run the same command again to continue."
        failed = ", ".join(dict.fromkeys(self.failed)) or "see above"
        return f"Failed: {failed}; {done}. All that Snakemake said: {self.full_log}"


def group_title(rules: Iterable[str]) -> str:
    """What a group of jobs of these rules is called."""
    return "a group of " + ", ".join(f"{count} {rule}" for rule, count in sorted(Counter(rules).items()))


def _number(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _at(text: str) -> str:
    return f"[{time.strftime('%H:%M:%S')}] {text}"


def _cut(text: str) -> str:
    return shortened(" ".join(text.split()), LONGEST)


def _complains(line: str) -> bool:
    return "error" in line.lower() or line.startswith(("Traceback", "Slurm job"))
