"""Whether the trainings of a configuration fit the GPUs, and adapters the model."""

from __future__ import annotations

from collections.abc import Iterable

from snaketron.config import Config, ConfigError, Training
from snaketron.config.linears import check_targets
from snaketron.config.training_checks import of_gpus
from snaketron.sizes.fitting import no_change, smallest_change
from snaketron.sizes.limits import Limits, check_limits
from snaketron.sizes.plan import Estimate, estimate
from snaketron.sizes.stages import pipeline_stages


def check_trainings(config: Config) -> None:
    """`ConfigError` when a training does not fit; those on request are checked when they are asked for."""
    trainings = [training for training in config.trainings() if not training.on_request]
    if problems := [problem for training in trainings for problem in _on_cpus(config, training)]:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    check_memory(config, trainings)


def check_requested(config: Config, training: Training, limits: Limits, *, merges: bool = False) -> None:
    """`ConfigError` when a training that was asked for does not fit the model, its jobs or the GPUs.

    Or when merging its adapters does not, where that `merges`.
    """
    problems = _on_cpus(config, training) or missing_targets(config, training)
    if problems := problems or check_limits(config, training, limits, merges=merges):
        raise ConfigError("\n".join(problems))
    check_memory(config, [training])


def _on_cpus(config: Config, training: Training) -> list[str]:
    """What needs a GPU in a training that Slurm is asked none for: it would say so when its job begins."""
    if config.cluster.gpus_per_node:
        return []
    return [
        f"{training.at(section)}{dot}{rest}: {value} needs a GPU, and cluster.gpus_per_node is 0, so "
        "trainings run on CPUs; say how many GPUs a node has, or take another value"
        for key, value in of_gpus(training.model, training.run, training.run.optimizer).items()
        for section, dot, rest in [key.partition(".")]
    ]


def missing_targets(config: Config, training: Training) -> list[str]:
    """Targets of adapters that mean no layer of the model, and pipeline stages without any."""
    if (adapters := training.adapters) is None:
        return []
    stages = pipeline_stages(training.model, config.tokenizer.vocab_size, training.run.parallel)
    return check_targets(training.at("target_modules"), adapters.target_modules, training.model, stages)


def check_memory(config: Config, trainings: Iterable[Training]) -> None:
    """`ConfigError` when a training needs more of a GPU than it has, by `cluster.gpu_memory_gb`."""
    limit = config.cluster.gpu_memory_gb
    if limit is None or not config.cluster.gpus_per_node:
        return
    # Phases that share their parallel sizes are one problem.
    largest: dict[str, tuple[Training, Estimate]] = {}
    for training in trainings:
        need, at = estimate(config, training), training.at("parallel")
        if at not in largest or need.memory.total > largest[at][1].memory.total:
            largest[at] = training, need
    problems = [
        _too_large(config, training, need)
        for training, need in largest.values()
        if need.memory.total / 1e9 > limit
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _too_large(config: Config, training: Training, need: Estimate) -> str:
    what = (
        f"{training.at('parallel')}: takes {need.memory.total / 1e9:.4g} GB of a GPU, more than "
        f"cluster.gpu_memory_gb {config.cluster.gpu_memory_gb:g}, of which weights, gradients and optimizer "
        f"take {need.memory.static / 1e9:.4g}; "
    )
    if found := smallest_change(config, training):
        change, then = found
        return f"{what}the smallest change that fits ({then.memory.total / 1e9:.4g} GB): {change}"
    return what + no_change(training)
