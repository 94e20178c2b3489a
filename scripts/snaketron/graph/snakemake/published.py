"""What is published stays until the job that replaces it has succeeded, and what failed is still to run.

Snakemake deletes the output of a job before it starts and after it fails. The output of a training is a
link to a version, that of an export a directory; both are marked with `update()`, so Snakemake leaves them
alone before the job. Six things that Snakemake 9.27 does are wrong for a checkpoint, the first three for any
output, and are replaced here:

- After a failure it records that the output was made with the new parameters and files. Where what follows
  was made before, the next start would take that for finished.
- Of a job that failed or was killed and whose output is gone it takes no notice, if what follows is there. It
  marks an output as incomplete after it has deleted it, so one that is killed in between leaves no mark.
- The Snakemake in a Slurm job takes the mark away that its output is incomplete. Where the one that submitted
  the job was killed before, nobody records parameters: a changed one would never be noticed again.
- After a failure it deletes an output of `update()`, which it takes for half of a new one.
- Before the job it copies such an output, or what the link leads to, which may be terabytes, to restore it
  after a failure.
- A link whose version somebody has deleted is there to it, and fails when it asks for its time.

Where it cannot delete an output, or make a directory, it prints a traceback; a line says so here.

After a run that failed it deletes empty directories of outputs, with those above them, such as a scratch of
the user. Where one is a link or a mount, that ends in a traceback before `onerror`. Here they stay.

A version that has lost something is there to it, too. The job that reads it would say so, perhaps after days
of other jobs, so `check_whole` says it before the first one.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from snaketron.huggingface.metadata import damaged_files
from snaketron.jobs.version import Version
from snaketron.log import UserError


def keep_what_failed() -> None:
    """Replace these in this process. A job that fails leaves what one leaves that Ctrl-C stopped.

    That is Snakemake's mark that its output is incomplete, so the job runs again, and what is published. So
    does one that succeeds, until the process that records its parameters has seen that. A link to nothing is
    a missing output, and is replaced by what makes it.
    """
    from snakemake.dag import DAG
    from snakemake.exceptions import WorkflowError
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
        if job not in failed and persistence.dag.workflow.is_main_process:
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

    async def incomplete(persistence: Any, job: Any) -> list[Any]:
        files = {persistence._get_key(file): file for file in job.output}
        marked = [files[key] for key in persistence._filter_incomplete_keys(list(files))]
        gone = {file for file in marked if not await file.exists()}
        persistence.dag.forcefiles |= gone  # nobody needs to say --rerun-incomplete where nothing is there
        return [file for file in marked if file not in gone]

    prepare_output = Job.prepare

    async def prepare(job: Any) -> None:
        with contextlib.suppress(OSError):  # Snakemake says so when it marks it once more
            job.dag.workflow.persistence.started(job)
        try:
            await prepare_output(job)
        except OSError as error:
            raise WorkflowError(f"Rule {job.rule.name} cannot write its files: {error}") from None

    Job.prepare, Job.postprocess = prepare, postprocess
    PersistenceBase.finished, PersistenceBase.incomplete = finished, incomplete
    FileBackupMixin.backup_output = lambda persistence, path: None
    DAG.cleanup_workdir = lambda dag: None
    _IOFile._local_inventory = look


def check_whole(dag: Any) -> None:
    """`WorkflowError` where a job that runs would read a published checkpoint that is damaged.

    What this run makes anew is left out, and the report, which shows what is there.
    """
    from snakemake.exceptions import WorkflowError
    from snakemake.io import is_flagged

    readers: dict[str, str] = {}  # of each checkpoint, the rule of a job that reads it
    for job in dag.needrun_jobs(exclude_finished=False):
        for maker, files in dag.dependencies[job].items() if job.rule.name != "report" else ():
            published = [str(file) for file in maker.output if is_flagged(file, "update") and file in files]
            readers |= {} if dag.needrun(maker) else dict.fromkeys(published, job.rule.name)
    problems = [
        f"{path}, which rule {reader} reads, is damaged: {problem}"
        for path, reader in readers.items()
        if Path(path).is_symlink()  # an export is a directory, and a checkpoint a link
        for problem in _damage(Path(path))
    ]
    if problems:
        raise WorkflowError("\n".join(problems))


def _damage(link: Path) -> Iterator[str]:
    """What a published checkpoint has lost, with what has it made again from its last step that is whole."""
    version, broken = Version(link), list[Path]()
    try:
        version.check_finished()
        version.describe()
        last = version.iteration_directory(version.latest_iteration() or 0)
        broken.append(last)
        if not (problems := damaged_files(last)):
            return
    except UserError as error:
        problems = [str(error)]
    gone = shlex.join(str(path) for path in (*broken, version.record, link) if os.path.lexists(path))
    # The advice behind the semicolon is for a base that the user names.
    yield f"{problems[0].partition('; ')[0]}. Restore that, or have it made again:\n    rm -r {gone}"
