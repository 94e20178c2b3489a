"""Jobs that have to run again, and that Snakemake would pass over.

- Snakemake 9.27 does not ask the jobs after one that runs, because that one makes them run. Where `ancient`
  files alone connect them it does not: what else was changed for them, parameters or other files, would be
  seen by the next start of Snakemake, and what is made until then would be made of their old output.
- A blend names the shards that trainings read. Where one is gone, Snakemake makes it again only for a new
  blend, and the training would fail each time: after a job of changed settings had failed, which deletes its
  output, and these settings were taken back. For a new blend it makes none of the held-out shards, which are
  no input of the blend but are listed in the records that it reads: the blend would fail each time.
- Outputs that a clock ahead has written pass for newer than what is made before them today: a run that ended
  between the two would be taken for finished.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from snaketron.graph.snakemake.published import check_whole

VIEWS = ("blend_pretrain", "blend_sft")  # whose output names files for the jobs after it
AHEAD = 600  # seconds by which the clocks of machines and file servers may differ

type Jobs = Mapping[Any, Mapping[Any, set[Any]]]  # by job those after it, with the files that connect them


def ask_each_job(roots: Iterable[str]) -> None:
    """Replace what decides it in this process; `roots` are the directories of outputs."""
    from snakemake.dag import DAG

    original = DAG.update_needrun

    async def update_needrun(dag: Any, *args: Any, **keys: Any) -> None:
        dag.bfs = made_to_run  # with which it finds the jobs that it does not ask
        try:
            await original(dag, *args, **keys)
            lost = dict[Any, list[str]]()
            while gone := lost_shards(dag):  # of a blend that runs for the shards of another, too
                lost |= gone
                for job in gone:
                    dag.forcefiles.update(job.output)
                await original(dag, *args, **keys)
            for job, files in lost.items():
                dag.reason(job).forced = False
                dag.reason(job).missing_output.update(files)
        finally:
            del dag.bfs
        if dag.workflow.is_main_process:
            check_times(dag, roots)
            check_whole(dag)

    DAG.update_needrun = update_needrun


def made_to_run(after: Jobs, job: Any) -> Iterator[Any]:
    """A job and all jobs that run because it does."""
    found, waiting = {job}, [job]
    while waiting:
        one = waiting.pop()
        yield one
        for other, files in after[one].items():
            if other not in found and not all(file.is_ancient for file in files):
                found.add(other)
                waiting.append(other)


def lost_shards(dag: Any) -> dict[Any, list[str]]:
    """The jobs whose output is gone, in part, that a blend names which runs, or for a job that runs."""
    makers = {
        maker
        for view in dag.jobs
        if view.rule.name in VIEWS
        and (
            dag.needrun(view)
            or any(
                dag.needrun(job) and view.output.blend in files for job, files in dag.depending[view].items()
            )
        )
        for maker in dag.dependencies[view]
        if not dag.needrun(maker)
    }
    gone = {maker: [file for file in maker.output if not Path(file).exists()] for maker in makers}
    return {maker: files for maker, files in gone.items() if files}


def check_times(dag: Any, roots: Iterable[str]) -> None:
    """`WorkflowError` where outputs are of a time that is yet to come."""
    from snakemake.exceptions import WorkflowError

    now, known = time.time(), dag.workflow.iocache.mtime
    times = {
        str(file): known[file].local_or_storage(follow_symlinks=True)
        for job in dag.jobs
        for file in job.output
        if file in known
    }
    if late := sorted(name for name, at in times.items() if at > now + AHEAD):
        more = f" and {len(late) - 1} more outputs" if len(late) > 1 else ""
        hours = (times[late[0]] - now) / 3600
        raise WorkflowError(
            f"{late[0]}{more}: of a time that is yet to come, in {hours:.1f} hours. A clock was ahead, and "
            "what is made of changed files now would pass for older. Correct the clock, or give them an old "
            "time, so that what follows from newer files is made again:\n"
            f"    find {shlex.join(sorted(set(roots)))} -newermt now -exec touch -h -d 2000-01-01 {{}} +"
        )
