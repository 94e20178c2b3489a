"""Ctrl-C waits for the moment in which Snakemake starts a job.

Snakemake 9.27 starts the thread of a job and then notes it. Where SIGINT comes in between it knows of no job
to wait for: it says how the run ended while the job runs, and then, in a traceback, that it cannot close the
event loop of that job.
"""

from __future__ import annotations

from typing import Any

from snaketron.graph import process


def start_whole() -> None:
    """Have SIGINT stop this process before or after a job is started, and not within."""
    from snakemake.executors.local import Executor

    original = Executor.run_job

    def run_job(executor: Any, job: Any) -> None:
        with process.interrupts_put_off():
            original(executor, job)

    Executor.run_job = run_job
