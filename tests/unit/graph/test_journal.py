"""What a run tells of itself."""

from __future__ import annotations

import resource
from pathlib import Path

from snaketron.graph.journal import JOURNAL, Journal
from tests.unit.report.live_run import RunLog


def test_a_full_disk_takes_the_event_that_it_cuts_off_and_no_later_one(tmp_path: Path):
    """The next line was written behind the one that was cut off, and both were lost."""
    log = RunLog(tmp_path, {"tokenize_shard": 3})
    for number in (1, 2, 3):
        log.begins(number, "tokenize_shard")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / JOURNAL).stat().st_size + 9, limits[1]))
    try:
        log.finishes(1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.finishes(2)
    log.fails(3)
    journal = Journal(tmp_path)
    journal.look()
    assert [job.state for job in journal.jobs.values()] == ["running", "finished", "failed"]
