"""What is published stays until the job that replaces it has succeeded.

Snakemake deletes the output of a job before it starts and after it fails. The output of a training is a
link to a version, that of an export a directory; both are marked with `update()`, so Snakemake leaves them
alone before the job. Three things that Snakemake 9.27 does with such an output are wrong for a checkpoint,
and are replaced here:

- Before the job it copies the output, or what the link leads to, which may be terabytes, to restore it after
  a failure.
- After a failure it records the output as made with the new parameters, so the job would not run again.
- A link whose version somebody has deleted is there to it, and fails when it asks for its time.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def keep_links() -> None:
    """Replace these in this process. A job that fails leaves what one leaves that Ctrl-C stopped.

    That is the link, and Snakemake's mark that its output is incomplete, so the job runs again. A link to
    nothing is a missing output, and is replaced by what makes it.
    """
    from snakemake.io import _IOFile, is_flagged
    from snakemake.jobs import Job
    from snakemake.persistence import FileBackupMixin

    original = Job.postprocess
    if original.__module__ == __name__:
        return

    async def postprocess(job: Any, *args: Any, error: bool = False, **keys: Any) -> None:
        if not (error and any(is_flagged(file, "update") for file in job.output)):
            await original(job, *args, error=error, **keys)

    look_around = _IOFile._local_inventory

    async def look(file: Any, cache: Any) -> None:
        known = cache.exists_local.has_inventory
        before = set(known)
        await look_around(file, cache)
        for directory in filter(os.path.isdir, known - before):
            with os.scandir(directory) as entries:
                for entry in entries:
                    if entry.is_symlink() and not Path(entry).exists():
                        cache.exists_local[entry.path] = False

    _IOFile._local_inventory = look
    Job.postprocess = postprocess
    FileBackupMixin.backup_output = lambda persistence, path: None
