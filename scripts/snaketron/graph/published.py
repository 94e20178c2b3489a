"""What is published stays until the job that replaces it has succeeded.

Snakemake deletes the output of a job before it starts and after it fails. The output of a training is a
link to a version, that of an export a directory; both are marked with `update()`, so Snakemake leaves them
alone before the job. Two things that Snakemake 9.27 does with such an output are wrong for a checkpoint, and
are replaced here:

- Before the job it copies the output, or what the link leads to, which may be terabytes, to restore it after
  a failure.
- After a failure it records the output as made with the new parameters, so the job would not run again.
"""

from __future__ import annotations

from typing import Any


def keep_links() -> None:
    """Replace both in this process. A job that fails leaves what one leaves that Ctrl-C stopped.

    That is the link, and Snakemake's mark that its output is incomplete, so the job runs again.
    """
    from snakemake.io import is_flagged
    from snakemake.jobs import Job
    from snakemake.persistence import FileBackupMixin

    original = Job.postprocess
    if original.__module__ == __name__:
        return

    async def postprocess(job: Any, *args: Any, error: bool = False, **keys: Any) -> None:
        if not (error and any(is_flagged(file, "update") for file in job.output)):
            await original(job, *args, error=error, **keys)

    Job.postprocess = postprocess
    FileBackupMixin.backup_output = lambda persistence, path: None
