"""Tells jobs that somebody has stopped from failed ones, alike for the lines of a run and its journal."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

END_OF_LOG = 15  # lines that are shown of the log of a failed job
STOPS = {"130", "143", "SIGINT", "SIGTERM"}  # how a command ends that was asked to stop
# Lines of the Snakemake inside a Slurm job, whose log also has what Slurm and the shell say.
INNER = re.compile(
    r"SNAKEMAKE$|=+$|Building DAG|Using shell|Provided |Rules claiming|Select jobs|Execute \d|Config file"
    r"|Assuming|host: |\[\w{3} \w{3} [ \d]\d |(local)?rule \w+:$|RuleException:|CalledProcessError in "
    r"|Command '|Shutting down|Exiting because|Complete log|WorkflowError:$|At least one job|Removing output"
    r"|Will exit|Error in (rule|group) |Finished job|\d+ of \d+ steps|srun: cluster configuration lacks"
    r"|  (Date|Workflow ID|Platform|Host|User|\w+ version|Command|Snakefile|\w+ directory|Config [\w()]+): "
    r"|    (input|output|log|jobid|benchmark|reason|wildcards|threads|resources|shell|params|priority): ?"
)
TERMINATING = "Terminating processes on user request"
STATUS = re.compile(r"returned non-zero exit status (\d+)|died with <Signals\.(\w+)")


@dataclass
class Stops:
    """Tells a job that was stopped from one that failed, by what Snakemake has said before."""

    interrupted: Callable[[], bool]  # whether SIGINT has come, to this process and its jobs
    asked: bool = False  # by the user, with Ctrl-C
    statuses: list[tuple[str, str]] = field(default_factory=list)  # messages on failed commands; exit status

    def hear(self, text: str) -> None:
        if text.startswith(TERMINATING):
            self.asked = True
        elif "CalledProcessError" in text and (found := STATUS.search(text)):
            self.statuses.append((text, found[1] or found[2]))

    def status(self, command: str | None) -> str | None:
        """The exit status of a failed command, which Snakemake has told in a message before."""
        return next((s for message, s in reversed(self.statuses) if command and command in message), None)

    def has_stopped(self, said: Mapping[str, Any]) -> bool:
        """Whether a job was stopped of which Snakemake says that it did not end well."""
        status, end = self.status(said["shellcmd"]), end_of(said["log"])
        asked = status in STOPS or (self.asked and status is None)  # Slurm gives no status
        # Ctrl-C ends a Python that has not begun its program with status 1.
        unbegun = self.interrupted() and not end
        return asked or unbegun or bool(end and "stopped by SIG" in end[-1])


def end_of(logs: Iterable[str]) -> list[str]:
    """The last lines of the first log that says something beside its command."""
    return next(filter(None, (_last(Path(log)) for log in logs)), [])


def _last(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # the job has not come as far as its log
        return []
    said = [line for line in lines if line.strip() and not line.startswith("$ ") and not INNER.match(line)]
    return said[-END_OF_LOG:]
