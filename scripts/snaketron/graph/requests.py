"""What Slurm will be asked for: all that a job needs, and enough for a training, whoever asks."""

from __future__ import annotations

from typing import Any

from snaketron.config import Config, ConfigError
from snaketron.graph.training import MERGED, OfPhase
from snaketron.sizes.limits import Limits, check_limits


def check_requests(workflow: Any, config: Config) -> dict[str, Limits]:
    """The limits of what Slurm runs, when all rules are defined: each training, and merging, by their names.

    Raises `ConfigError` where a training does not fit into them. One that is made on request alone is checked
    when it is asked for.
    """
    found, problems = {}, []
    for training in config.trainings():
        resources = workflow.get_rule(training.section).resources
        if "slurm_partition" not in resources:
            continue
        found[training.name] = limits_of(resources, training.phase)
        if training.adapters:
            found[MERGED] = limits_of(workflow.get_rule("merge_lora").resources)
        if not training.on_request:
            problems += check_limits(config, training, found[training.name])
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return found


def ask_for_threads(workflow: Any) -> None:
    """Let a dry-run on Slurm ask for the threads of each rule, as a run does.

    Where nobody says how many cores there are, Snakemake gives one to a dry-run, and any number to a run on a
    cluster.
    """
    settings = workflow.resource_settings
    on_slurm = "slurm_partition" in (settings.default_resources or {})
    if workflow.output_settings.dryrun and on_slurm and settings.cores == 1:
        workflow.global_resources["_cores"] = None


def limits_of(resources: Any, phase: str = "") -> Limits:
    """The limits in the resources of a rule; an expression is known only to its job.

    As the executor plugin reads them: 0 asks for nothing, and memory of a CPU comes before that of a node.
    """

    def value(name: str) -> Any:
        resource = resources.get(name)
        # `value` refuses a function, also the one that knows the phases
        asked = None if resource is None else resource._value
        return (asked.values[phase] if isinstance(asked, OfPhase) else asked) or None

    def number(name: str) -> float | None:
        asked = value(name)
        return float(asked) if isinstance(asked, int) else None

    if value("mem_mb_per_cpu") is None:
        return Limits(minutes=number("runtime"), mem_mb=number("mem_mb"))
    tasks = 1.0 if value("tasks_per_node") is None else number("tasks_per_node")
    per_cpu, per_task = number("mem_mb_per_cpu"), number("cpus_per_task")
    if not per_cpu or not tasks or not per_task or per_task < 0:  # less than 0: none are asked for
        return Limits(minutes=number("runtime"))
    cpus = per_task * tasks
    return Limits(minutes=number("runtime"), mem_mb=per_cpu * cpus, cpus=cpus)
