"""Whether what Slurm will be asked for a training is enough for it, whoever asks: rule, profile or user."""

from __future__ import annotations

from typing import Any

from snaketron.config import Config, ConfigError
from snaketron.graph.training import OfPhase
from snaketron.sizes.limits import Limits, check_limits


def check_requests(workflow: Any, config: Config) -> dict[str, Limits]:
    """The limits of each training that Slurm runs, by its name, when all rules are defined.

    Raises `ConfigError` where a training does not fit into them. One that is made on request alone is checked
    when it is asked for.
    """
    found, problems = {}, []
    for training in config.trainings():
        resources = workflow.get_rule(training.section).resources
        if "slurm_partition" not in resources:
            continue
        found[training.name] = limits_of(resources, training.phase)
        if not training.on_request:
            problems += check_limits(config, training, found[training.name])
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    return found


def limits_of(resources: Any, phase: str = "") -> Limits:
    """The limits in the resources of a rule; an expression is known only to its job."""

    def number(name: str) -> float | None:
        resource = resources.get(name)
        value = None
        if resource is not None:
            asked = resource._value  # `value` refuses a function, also the one that knows the phases
            value = asked.values[phase] if isinstance(asked, OfPhase) else asked
        return float(value) if isinstance(value, int) else None

    return Limits(minutes=number("runtime"), mem_mb=number("mem_mb"))
