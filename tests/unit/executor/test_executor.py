"""The executor is stopped while it submits."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

from snaketron.executor.executor import Executor
from snaketron.graph import process

import pytest


def test_ctrl_c_that_comes_while_a_job_goes_to_its_thread_is_obeyed_when_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
):
    """concurrent.futures would not wait for a thread that it has not noted: it submits after `scancel`."""
    start, submitted = threading.Thread.start, list[str]()

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        os.kill(os.getpid(), signal.SIGINT)

    def run_job(job: str) -> None:
        time.sleep(1)
        submitted.append(job)

    threads = ThreadPoolExecutor(max_workers=2)
    executor = SimpleNamespace(
        run_job=run_job,
        run_job_pre=lambda job: None,
        _check_submitted=lambda job, done: None,
        _job_submission_executor=threads,
    )
    monkeypatch.setattr(process, "_interrupts", [])
    before = signal.getsignal(signal.SIGINT)
    process.obey_interrupts()
    try:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(threading.Thread, "start", interrupted)
            Executor._submit_job(cast(Any, executor), "job")
    finally:
        signal.signal(signal.SIGINT, before)
    threads.shutdown(wait=True, cancel_futures=True)
    assert submitted == ["job"]
