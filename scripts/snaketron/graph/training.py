"""What the rules of trainings ask while Snakemake builds the graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from snaketron.config import Config, ConfigError, Training
from snaketron.graph.base import BaseGraph
from snaketron.graph.unknown import find
from snaketron.huggingface.peft import refused
from snaketron.jobs.version import Version
from snaketron.settings.keeping import kept_at_end
from snaketron.settings.schedule import steady_steps
from snaketron.settings.training import RunSettings, run_settings, train_settings
from snaketron.sizes.checks import check_requested
from snaketron.sizes.layout import layout, resources
from snaketron.sizes.limits import Limits
from snaketron.sizes.memory import conversion_memory
from snaketron.wording import plural

MERGED = "lora_merged"  # the stage of adapters that are added to their base


class TrainingGraph:
    """Answers about trainings. One is known by its rule and, in pretraining, by the wildcard `phase`."""

    def __init__(self, config: Config, bases: BaseGraph) -> None:
        self.config, self.bases = config, bases
        self.phases = [phase.name for phase in config.pretrain.phases]
        self.limits: Mapping[str, Limits] = {}  # by training, once all rules are defined

    # Input functions get the wildcards of the job.

    def previous_phase(self, wildcards: Any) -> list[str]:
        """The checkpoint that a phase starts from; none for the first one that has no base."""
        numbers = {phase: number for number, phase in enumerate(self.phases)}
        if index := find("phase of pretraining", wildcards.phase, numbers):
            return [f"<ckpt>/pretrain/{self.phases[index - 1]}"]
        return [base] if (base := self.bases.start("pretrain")) else []

    def averaged(self, wildcards: Any) -> str:
        """The phase whose checkpoints are averaged; `ConfigError` where fewer than two are and will be there.

        One that was trained with other keys may have more than it would keep now.
        """
        phase: str = wildcards.phase
        find("phase of pretraining", phase, dict.fromkeys(self.phases))
        self._check_averaged(self.config.training(f"pretrain/{phase}"))
        return f"<ckpt>/pretrain/{phase}"

    def base(self, section: str) -> str:
        """The checkpoint that SFT or LoRA starts from."""
        return self.bases.start(section) or f"<ckpt>/pretrain/{self.phases[-1]}"

    # Params: a change runs the job again.

    def settings(self, rule: str, stage: str | None = None) -> Callable[[Any], str]:
        """What defines the result of the trainings of a rule; `stage` names what another job makes of one."""

        def of_job(wildcards: Any) -> str:
            phase = getattr(wildcards, "phase", "")
            training = self.config.training(f"{rule}/{phase}" if phase else rule)
            if training.on_request:
                limits = self.limits.get(stage or training.name, Limits())
                check_requested(self.config, training, limits, merges=stage == MERGED)
            found = train_settings(self.config, training.name)
            return found.model_copy(update={"stage": stage or training.name}).model_dump_json()

        return of_job

    def exported_base(self, _wildcards: Any) -> str:
        """The export of the model that adapters belong to; `ConfigError` where PEFT cannot express them."""
        if problems := refused(self.config.lora, self.config.model):
            raise ConfigError("\n".join(problems))
        base, hf, ckpt = self.base("lora"), self.config.pathvars["hf"], self.config.pathvars["ckpt"]
        if base.startswith("<ckpt>"):
            return base.replace("<ckpt>", hf)
        stage = Version(Path(base)).describe().stage
        if Path(ckpt, stage).resolve() != Path(base).resolve():
            raise ConfigError(
                f"lora.base: {base} is not what {ckpt}/{stage} leads to, so no rule exports it; take "
                f"{hf}/{MERGED}, or name its export: `python scripts/export_hf.py --checkpoint {ckpt}/lora "
                f"--base EXPORT --output {hf}/lora`"
            )
        return f"{hf}/{stage}"

    # Resources: a change runs nothing again.

    def threads(self, rule: str) -> Any:
        """CPUs of a training on a node, for `profiles/local`, which caps them at those of the machine."""
        return _shared({phase: cpus(run) for phase, run in self._runs(rule).items()})

    def resources(self, rule: str) -> dict[str, Any]:
        """What a training asks Slurm for, and what else its command needs that does not define its result."""
        asked = {phase: requested(run) for phase, run in self._runs(rule).items()}
        # Snakemake leaves out a resource that is None: a phase on one node has no `mpi`.
        names = dict.fromkeys(name for of_phase in asked.values() for name in of_phase)
        shared = {
            name: _shared({phase: of_phase.get(name) for phase, of_phase in asked.items()}) for name in names
        }
        return shared | {"attempt": attempt}

    @property
    def conversion_mb(self) -> int:
        """Memory of a job that exports or imports the model."""
        return math.ceil(conversion_memory(self.config.model, self.config.tokenizer.vocab_size) / 1e6)

    def _check_averaged(self, training: Training) -> None:
        settings, run, steps = train_settings(self.config, training.name), training.run, training.train_iters
        steady = steady_steps(settings.schedule, settings.optimizer, steps)
        there = Version(Path(self.config.pathvars["ckpt"], training.name)).iterations()
        found = [step for step in kept_at_end(run, steady, steps) if step <= steady]
        if len(found) < 2 and sum(0 < step <= steady for step in there) < 2:
            raise ConfigError(
                f"pretrain.keep_steady {run.keep_steady}, steady_interval "
                f"{run.steady_interval or run.save_interval}: {training.name} would keep "
                f"{plural(len(found), 'checkpoint')} from before its learning rate falls, after step "
                f"{steady:,} of {steps:,}, and an average takes two"
            )

    def _runs(self, rule: str) -> dict[str, RunSettings]:
        """How the trainings of a rule are run, by phase; those that are no phases have the name ""."""
        return {
            training.phase: run_settings(self.config, training.name)
            for training in self.config.trainings()
            if training.section == rule
        }


def cpus(run: RunSettings) -> int:
    """CPUs of the processes on a node."""
    return run.cpus_per_task * layout(run, run.cluster).tasks_per_node


def requested(run: RunSettings) -> dict[str, Any]:
    """What Slurm is asked for, and how it is run."""
    return resources(run, run.cluster) | {"run": run.model_dump_json(exclude_defaults=True)}


class OfPhase:
    """A resource that has another value in each phase; Snakemake calls it with the wildcards of a job."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def __call__(self, wildcards: Any) -> Any:
        return self.values.get(wildcards.phase)


def _shared(values: Mapping[str, Any]) -> Any:
    """The value that all trainings of a rule have, or a function of the phase."""
    first, *others = values.values()
    return first if all(other == first for other in others) else OfPhase(values)


def attempt(_wildcards: Any, attempt: int) -> int:
    """How often Snakemake has submitted a job, this time included."""
    return attempt
