"""Each job is asked whether it has to run again, also after a job that runs and gives it `ancient` files.

Snakemake 9.27 does not ask the jobs after one that runs, because that one makes them run. Where `ancient`
files alone connect them it does not: what else was changed for them, parameters or other files, would be seen
by the next start of Snakemake, and what is made until then would be made of their old output.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

type Jobs = Mapping[Any, Mapping[Any, set[Any]]]  # by job those after it, with the files that connect them


def ask_each_job() -> None:
    """Replace it in this process."""
    from snakemake.dag import DAG

    original = DAG.update_needrun
    if original.__module__ == __name__:
        return

    @functools.wraps(original)
    async def update_needrun(dag: Any, *args: Any, **keys: Any) -> None:
        dag.bfs = made_to_run  # with which it finds the jobs that it does not ask
        try:
            await original(dag, *args, **keys)
        finally:
            del dag.bfs

    update_needrun.__module__ = __name__
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
