"""What Snakemake does for each job of a dry-run, and nobody sees: left out, for graphs of thousands of jobs.

A dry-run of 6,928 jobs wrote ten lines and three commands a job; `graph.lines` shows one of the lines. It
also asked 100,000 times what it knew: the signatures of forty functions, the rule that makes the tokenizer,
the flags of a file. No check and no message is lost; a test compares each replacement with what it replaces.
A run has Snakemake as it is.
"""

from __future__ import annotations

import functools
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from snakemake_interface_logger_plugins.common import LogEvent

_PLAIN = re.compile(r"(?:\w[\w.-]*/)*\w[\w.-]*", re.ASCII)  # a path of which there is nothing to warn


def say_one_line() -> None:
    """Have the jobs of a dry-run tell what their line needs, and no command."""
    from snakemake.jobs import Job
    from snakemake.logging import logger

    def log_info(job: Any, indent: bool = False, printshellcmd: bool = True) -> None:
        job.params  # noqa: B018  evaluated here alone: what is wrong with them is an error of the dry-run
        number = job.dag.jobid(job)
        logger.info(
            f" Rule: {job.rule.name}, Jobid: {number}",
            extra={
                "event": LogEvent.JOB_INFO,
                "jobid": number,
                "rule_name": job.rule.name,
                "wildcards": job.wildcards_dict,
                "reason": str(job.dag.reason(job)),
                "local": False,
                "indent": indent,
            },
        )

    Job.log_info = log_info


def remember() -> None:
    """Have Snakemake ask once, in this process, what it asks for each job or file."""
    from snakemake import common, dag, io, iocontainers, jobs, output_index, pathvars, rules

    remembered = functools.cache(common.get_function_params)
    for module in (common, jobs, rules):
        module.get_function_params = remembered
    for module in (dag, io, jobs, rules):
        module.is_flagged = is_flagged
    io.check = check_path(io.check)
    io._IOFile.is_storage = property(is_storage)
    io._IOFile.exists = exists(io._IOFile.exists)
    iocontainers.Namedlist.__init__ = named_list(iocontainers.Namedlist.__init__)
    pathvars.Pathvars.apply = apply_pathvars(pathvars.Pathvars.apply)
    output_index.OutputIndex.match_producers = makers(output_index.OutputIndex.match_producers)
    dag.DAG.check_directory_outputs = check_directory_outputs
    jobs.Job.is_valid = is_valid
    jobs.Job.missing_output = missing_output
    jobs.Job.output_mintime = property(output_mintime)
    jobs.Job.check_protected_output = check_protected_output
    rules.Rule.apply_input_function = apply_input_function(rules.Rule.apply_input_function)


def is_flagged(value: Any, flag: str) -> bool:
    """Whether a file or a function has a flag such as `ancient`; Snakemake first asks an abstract class."""
    flags = getattr(value, "flags", None)
    return type(flags) is dict and bool(flags.get(flag))


def is_storage(file: Any) -> bool:
    """Whether a file lies elsewhere, for Snakemake: it asks 100 times a job."""
    flags: dict[str, Any] = getattr(file._file, "_flags", None) or {}
    return bool(flags.get("storage_object"))


def exists(original: Any) -> Any:
    """Whether a file exists: what is known of it is looked up here, before anything is asked."""

    async def exists(file: Any) -> bool:
        cache = file.rule.workflow.iocache
        if cache.active and not file.is_storage:
            known: bool | None = dict.get(cache.exists_local, file)
            if known is not None:
                return known
        found: bool = await original(file)
        return found

    return exists


def check_path(original: Any) -> Any:
    """Warn of what is strange in a path; a plain one is not looked at seven times."""

    def check(file: str, rule: Any = None, is_storage: bool = False) -> None:
        if not _PLAIN.fullmatch(file):
            original(file, rule=rule, is_storage=is_storage)

    return check


def apply_pathvars(original: Any) -> Any:
    """Fill in the roots of a path; most paths have none left."""

    def apply(pathvars: Any, path: str) -> str:
        filled: str = original(pathvars, path) if "<" in path else path
        return filled

    return apply


def named_list(original: Any) -> Any:
    """Make a list whose items have names, without the imports and guards that each list has of its own."""
    from snakemake.iocontainers import AttributeGuard, Namedlist

    guards = {name: AttributeGuard(name) for name in ("index", "sort")}

    def init(made: Any, toclone: Any = None, fromdict: Any = None, **keys: Any) -> None:
        if keys:
            original(made, toclone, fromdict, **keys)
            return
        made._names = {}
        made._allowed_overrides = [*guards]
        made.__dict__.update(guards)
        if toclone is not None:
            made.extend(toclone)
            if isinstance(toclone, Namedlist):
                made._take_names(toclone._get_names())
        for name, item in (fromdict or {}).items():
            made.append(item)
            made._add_name(name)

    return init


def makers(original: Any) -> Any:
    """The rules that make a file, remembered. Each index keeps its own: a new rule makes a new index."""

    def match_producers(index: Any, targetfile: str) -> Any:
        known = index.__dict__.setdefault("_makers", {})
        if targetfile not in known:
            known[targetfile] = original(index, targetfile)
        return known[targetfile]

    return match_producers


def check_directory_outputs(dag: Any) -> None:
    """Raise `ChildIOException` where an output lies in a directory that another job makes.

    Snakemake sorts all paths and compares neighbours; here each directory is looked for once.
    """
    from snakemake.exceptions import ChildIOException

    made: dict[Path, dict[str, Any]] = {}  # of each directory its outputs, and the jobs that make them
    absolute = functools.cache(lambda directory: Path(directory).absolute())
    for job in dag.jobs:
        for file in job.output:
            directory, slash, name = file.rpartition("/")
            made.setdefault(absolute(directory + slash), {})[name] = job

    @functools.cache
    def nearest(directory: Path) -> tuple[Path, Any] | None:
        """The nearest output that is this directory or above it, and its job."""
        if directory.name in made.get(directory.parent, {}):
            return directory, made[directory.parent][directory.name]
        return None if directory.parent == directory else nearest(directory.parent)

    for directory, files in made.items():
        if above := nearest(directory):
            for name, job in files.items():
                if job != above[1]:
                    raise ChildIOException(parent=above, child=(directory / name, job))


def is_valid(job: Any) -> None:
    """Name the log and the benchmark, which is an error where a wildcard is missing; they are kept."""
    job.benchmark  # noqa: B018
    job.log  # noqa: B018


async def missing_output(job: Any, requested: Any) -> AsyncIterator[Any]:
    """The requested outputs that are missing; what is a pipe or a service always is."""
    for file in requested:
        own = job.output_by_path.get(str(file), file)
        if is_flagged(own, "pipe") or is_flagged(own, "service") or not await own.exists():
            yield own


async def output_mintime(job: Any) -> float | None:
    """When the oldest output was made, the benchmark among them; Snakemake starts a task for each file."""
    files = [*job.output, *([job.benchmark] if job.benchmark else [])]
    times = [(await file.mtime()).local_or_storage() for file in files if await file.exists()]
    return min(times, default=None)


async def check_protected_output(job: Any) -> None:
    """Raise where an output is write-protected. Snakemake starts a task for each file."""
    from snakemake.exceptions import ProtectedOutputException

    protected = [file for file in job.output if await file.protected()]
    if protected:
        raise ProtectedOutputException(job, protected)


def apply_input_function(original: Any) -> Any:
    """Call an input function; a resource that is a number is no function, and is what it is."""
    from snakemake.resources import Resource

    def apply(rule: Any, func: Any, *args: Any, **keys: Any) -> Any:
        asked = getattr(func, "__self__", None)
        if isinstance(asked, Resource) and asked._evaluator is None and func.__name__ == "evaluate":
            return asked, False
        return original(rule, func, *args, **keys)

    return apply
