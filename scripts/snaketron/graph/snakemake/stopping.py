"""SIGTERM is obeyed in any moment.

The handler of Snakemake 9.27 takes a lock that the main thread, in which handlers run, holds itself while it
chooses jobs and finishes them. Where SIGTERM comes then, both wait for ever: the jobs end, and Snakemake does
not. So it is with the semaphore that wakes the scheduler, for shorter moments.
"""

from __future__ import annotations

import queue
from typing import Any


class Wakes:
    """A semaphore that a handler of signals may release while its thread acquires it."""

    def __init__(self) -> None:
        self._queue = queue.SimpleQueue[None]()  # Python promises this of `put`, and of no lock

    def release(self) -> None:
        self._queue.put(None)

    def acquire(self) -> None:
        self._queue.get()


def obey_sigterm() -> None:
    """Have SIGTERM note that Snakemake shall stop when its jobs have ended, and wait for nothing."""
    from snakemake.scheduling.job_scheduler import JobScheduler

    original = JobScheduler.__init__

    def init(scheduler: Any, *args: Any, **keys: Any) -> None:
        original(scheduler, *args, **keys)
        scheduler._open_jobs = Wakes()
        scheduler._open_jobs.release()  # as it begins

    def exit_gracefully(scheduler: Any, *_: Any) -> None:
        scheduler._user_kill = "graceful"
        scheduler._open_jobs.release()

    JobScheduler.__init__ = init
    JobScheduler.exit_gracefully = exit_gracefully
