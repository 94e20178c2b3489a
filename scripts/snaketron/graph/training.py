"""What the rules of trainings ask while Snakemake builds the graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from snaketron.config import Config, Training
from snaketron.settings.training import run_settings, train_settings
from snaketron.sizes.checks import check_requested
from snaketron.sizes.layout import layout, resources
from snaketron.sizes.limits import Limits
from snaketron.sizes.memory import conversion_memory


class TrainingGraph:
    """Answers about trainings. One is known by its rule and, in pretraining, by the wildcard `phase`."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.phases = [phase.name for phase in config.pretrain.phases]
        self.limits: Mapping[str, Limits] = {}  # of the jobs of each rule, once all rules are defined

    # Input functions get the wildcards of the job.

    def previous_phase(self, wildcards: Any) -> list[str]:
        """The checkpoint that a phase starts from; none for the first."""
        index = self.phases.index(wildcards.phase)
        return [f"<ckpt>/pretrain/{self.phases[index - 1]}"] if index else []

    @property
    def last_phase(self) -> str:
        return self.phases[-1]

    # Params: a change runs the job again.

    def settings(self, rule: str, stage: str | None = None) -> Callable[[Any], str]:
        """What defines the result of the trainings of a rule; `stage` names what another job makes of one."""

        def of_job(wildcards: Any) -> str:
            phase = getattr(wildcards, "phase", "")
            training = self.config.training(f"{rule}/{phase}" if phase else rule)
            if training.on_request:
                check_requested(self.config, training, self.limits.get(rule, Limits()))
            found = train_settings(self.config, training.name)
            return found.model_copy(update={"stage": stage or training.name}).model_dump_json()

        return of_job

    # Resources: a change runs nothing again.

    def run(self, rule: str) -> str:
        """How the trainings of a rule are run."""
        return run_settings(self.config, self._any(rule).name).model_dump_json(exclude_defaults=True)

    def threads(self, rule: str) -> int:
        """CPUs of a training on a node, for `profiles/local`, which caps them at those of the machine."""
        run = self._any(rule).run
        return run.cpus_per_task * layout(run, self.config.cluster).tasks_per_node

    def resources(self, rule: str) -> dict[str, Any]:
        """What a training asks Slurm for, and what else its command needs that does not define its result."""
        asked = resources(self._any(rule).run, self.config.cluster)
        return asked | {"run": self.run(rule), "attempt": attempt}

    @property
    def conversion_mb(self) -> int:
        """Memory of a job that exports or imports the model."""
        return math.ceil(conversion_memory(self.config.model, self.config.tokenizer.vocab_size) / 1e6)

    def _any(self, rule: str) -> Training:
        """A training of a rule: all phases of pretraining are run in the same way."""
        return next(training for training in self.config.trainings() if training.section == rule)


def attempt(_wildcards: Any, attempt: int) -> int:
    """How often Snakemake has submitted a job, this time included."""
    return attempt
