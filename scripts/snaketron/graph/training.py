"""What the rules of trainings ask while Snakemake builds the graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping
from pathlib import Path
from typing import Any

from snaketron.config import Config, ConfigError, Run, Training
from snaketron.config.evaluation import Evaluation
from snaketron.config.names import unusable
from snaketron.graph.base import BaseGraph
from snaketron.graph.unknown import find
from snaketron.huggingface.peft import refused
from snaketron.jobs.version import Version
from snaketron.settings.evaluation import eval_run, eval_settings, files_below
from snaketron.settings.keeping import kept_at_end
from snaketron.settings.schedule import steady_steps
from snaketron.settings.training import RunSettings, run_settings, train_settings
from snaketron.sizes.checks import check_requested
from snaketron.sizes.layout import layout, resources
from snaketron.sizes.limits import Limits
from snaketron.sizes.memory import conversion_memory
from snaketron.sources.models import task_data
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

    def task_data(self, _wildcards: Any) -> list[str]:
        """The files of the tasks of an evaluation: of the hub, as they are downloaded, and of the user.

        `ConfigError` where the name of one cannot be used.
        """
        section, of_hub = self.config.eval, task_data(self.config)
        downloaded = [path for data in of_hub.values() for path in data.files(self.bases.lock)]
        data = (task.data for task in section.tasks if task.data and task.data not in of_hub)
        files = files_below([*section.task_directories, *data])
        if problems := [problem for path in files if (problem := unusable(path))]:
            raise ConfigError("\n".join(f"eval.tasks: {problem}" for problem in problems))
        return [*downloaded, *files]

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
        return self.base("lora").replace("<ckpt>", self.config.pathvars["hf"])

    # Resources: a change runs nothing again.

    def threads(self, rule: str) -> Any:
        """CPUs of a training on a node, for `profiles/local`, which caps them at those of the machine."""
        return _shared({training.phase: self._cpus(training.run) for training in self._of(rule)})

    def _cpus(self, run: Run) -> int:
        return run.cpus_per_task * layout(run, self.config.cluster).tasks_per_node

    def resources(self, rule: str) -> dict[str, Any]:
        """What a training asks Slurm for, and what else its command needs that does not define its result."""
        asked = {
            training.phase: self._asked(run_settings(self.config, training.name))
            for training in self._of(rule)
        }
        # Snakemake leaves out a resource that is None: a phase on one node has no `mpi`.
        names = dict.fromkeys(name for of_phase in asked.values() for name in of_phase)
        shared = {
            name: _shared({phase: of_phase.get(name) for phase, of_phase in asked.items()}) for name in names
        }
        return shared | {"attempt": attempt}

    def _asked(self, run: RunSettings) -> dict[str, Any]:
        asked = resources(run, self.config.cluster)
        return asked | {"run": run.model_dump_json(exclude_defaults=True)}

    def eval_settings(self, wildcards: Any) -> str:
        """What defines the evaluation of a checkpoint; `ConfigError` where the data of a task is not here."""
        of_hub = task_data(self.config)
        if problems := list(missing_tasks(self.config.eval, of_hub)):
            raise ConfigError("\n".join(problems))
        root = self.config.pathvars["data"]
        downloaded = {name: f"{root}/hub/{data.place(self.bases.lock)}" for name, data in of_hub.items()}
        return eval_settings(self.config, wildcards.stage, downloaded).model_dump_json()

    def eval_resources(self) -> dict[str, Any]:
        """What an evaluation asks Slurm for, and how it is run."""
        return self._asked(eval_run(self.config))

    def eval_threads(self) -> int:
        """CPUs of an evaluation on a node."""
        return self._cpus(eval_run(self.config))

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

    def _of(self, rule: str) -> list[Training]:
        """The trainings of a rule: all phases of pretraining, else one."""
        return [training for training in self.config.trainings() if training.section == rule]


def missing_tasks(section: Evaluation, downloaded: Container[str] = ()) -> Iterator[str]:
    """The directories of tasks and of their data that are not there, or hold nothing, a line each.

    A task without a directory is not looked for: its data is `downloaded` before, may lie in the cache of the
    hub, or where its own YAML says.
    """
    own, data = "name the directory of your own tasks", "download the data set on a machine with a network"
    named = [
        (f"eval.task_directories[{i}]", path, "", own) for i, path in enumerate(section.task_directories)
    ]
    named += [
        (f"eval.tasks[{i}].data", task.data, f" of {task.name}", data)
        for i, task in enumerate(section.tasks)
        if task.data is not None and task.data not in downloaded
    ]
    for at, path, of, advice in named:
        if not Path(path).is_dir():
            what = "is no directory" if Path(path).exists() else "is not there"
            yield f"{at}: {path}{of} {what}; {advice}"
        elif not any(Path(path).iterdir()):
            yield f"{at}: {path}{of} is empty; {advice}"


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
