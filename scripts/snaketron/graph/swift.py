"""What Snakemake does for each job of a dry-run, and nobody sees: left out, for graphs of thousands of jobs.

Of 6,928 jobs, a third of the time went to texts of ten lines and three commands a job, of which `graph.lines`
shows one line, and a twelfth to the signatures of the same forty functions.
"""

from __future__ import annotations

import functools
from typing import Any

from snakemake_interface_logger_plugins.common import LogEvent


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


def remember_signatures() -> None:
    """Look at the signature of a function once, and not for each job."""
    from snakemake import common, jobs, rules

    if not hasattr(common.get_function_params, "cache_info"):
        remembered = functools.cache(common.get_function_params)
        for module in (common, jobs, rules):
            module.get_function_params = remembered
