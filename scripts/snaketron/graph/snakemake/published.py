"""What is published stays until the job that replaces it has succeeded, and what failed is still to run.

Snakemake deletes the output of a job before it starts and after it fails. The output of a training is a
link to a version, that of an export a directory; both are marked with `update()`, so Snakemake leaves them
alone before the job. Four things that Snakemake 9.27 does are wrong for a checkpoint, the first one for any
output, and are replaced here:

- After a failure it records that the output was made with the new parameters and files. Where what follows
  was made before, the next start would take that for finished.
- After a failure it deletes an output of `update()`, which it takes for half of a new one.
- Before the job it copies such an output, or what the link leads to, which may be terabytes, to restore it
  after a failure.
- A link whose version somebody has deleted is there to it, and fails when it asks for its time.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def keep_what_failed() -> None:
    """Replace these in this process. A job that fails leaves what one leaves that Ctrl-C stopped.

    That is Snakemake's mark that its output is incomplete, so the job runs again, and what is published. A
    link to nothing is a missing output, and is replaced by what makes it.
    """
    from snakemake.io import _IOFile, is_flagged
    from snakemake.jobs import Job
    from snakemake.persistence import FileBackupMixin, PersistenceBase

    failed = set[Any]()
    end, record = Job.postprocess, PersistenceBase.finished

    async def postprocess(job: Any, *args: Any, error: bool = False, **keys: Any) -> None:
        (failed.add if error else failed.discard)(job)
        if not (error and any(is_flagged(file, "update") for file in job.output)):
            await end(job, *args, error=error, **keys)

    async def finished(persistence: Any, job: Any) -> None:
        if job not in failed:
            await record(persistence, job)

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

    Job.postprocess, PersistenceBase.finished = postprocess, finished
    FileBackupMixin.backup_output = lambda persistence, path: None
    _IOFile._local_inventory = look
