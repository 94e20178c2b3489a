"""Whether what Slurm will be asked for a training is enough for it, whoever asks: rule, profile or user."""

from __future__ import annotations

from typing import Any

from snaketron.config import Config, ConfigError
from snaketron.sizes.limits import Limits, check_limits


def check_requests(workflow: Any, config: Config) -> dict[str, Limits]:
    """The limits of the rules of trainings that Slurm runs, when all rules are defined.

    Raises `ConfigError` where a training does not fit into them. One that is made on request alone is checked
    when it is asked for.
    """
    found = {
        section: limits_of(workflow.get_rule(section).resources)
        for section in {training.section for training in config.trainings()}
        if "slurm_partition" in workflow.get_rule(section).resources
    }
    problems = [
        problem
        for training in config.trainings()
        if training.section in found and not training.on_request
        for problem in check_limits(config, training, found[training.section])
    ]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return found


def limits_of(resources: Any) -> Limits:
    """The limits in the resources of a rule; an expression is known only to its job."""

    def number(name: str) -> float | None:
        resource = resources.get(name)
        known = resource is not None and not resource.is_evaluable()
        return float(resource.value) if known and isinstance(resource.value, int) else None

    return Limits(minutes=number("runtime"), mem_mb=number("mem_mb"))
