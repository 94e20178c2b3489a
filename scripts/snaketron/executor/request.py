"""The options of sbatch for a job, as a dry-run shows them and a run sends them."""

from __future__ import annotations

import shlex
from types import SimpleNamespace
from typing import Any

from snakemake_executor_plugin_slurm.submit_string import get_submit_command
from snakemake_executor_plugin_slurm.utils import set_gres_string
from snakemake_executor_plugin_slurm_jobstep import get_cpu_setting, get_gpu_setting, get_node_setting

ALWAYS = "--open-mode=append"  # for every job: the log of a requeued job is continued
_SETTINGS = SimpleNamespace(requeue=True, qos=None, reservation=None)


def account(job: Any) -> str:
    """The option for the account of a job. A wrong account is refused by sbatch."""
    name = job.resources.get("slurm_account")
    return f" -A {shlex.quote(str(name))}" if name else ""


def sbatch_options(job: Any) -> str:
    """The options for a job, written by the executor plugin's own functions, without names and command."""
    params = {
        "run_uuid": "-",
        "slurm_logfile": "-",
        "comment_str": "-",
        "account": account(job),
        "partition": f"-p {shlex.quote(str(job.resources.slurm_partition))} {ALWAYS}",
        "workdir": None,
    }
    call = get_submit_command(job, params, settings=_SETTINGS)
    options = call.partition(" --comment - ")[2] + set_gres_string(job)
    return " ".join(options.split())


def step_options(job: Any) -> str:
    """The options of srun for the step that a job runs in; a job of several nodes starts steps itself.

    The efficiency report is about steps, and a step has the CPUs that the job asked for.
    """
    if job.resources.get("mpi") is not None:
        return ""
    options = ("-n1 --cpu-bind=q", get_cpu_setting(job, True), get_gpu_setting(job), get_node_setting(job))
    return " ".join(option for option in options if option)
