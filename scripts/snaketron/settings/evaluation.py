"""What the evaluation of a checkpoint is told."""

from __future__ import annotations

from collections.abc import Mapping

from snaketron.config import Config, Section
from snaketron.config.evaluation import Task
from snaketron.settings.training import RunSettings


class EvalSettings(Section):
    """Everything that, with the data and the checkpoint, defines the results."""

    stage: str
    text_tokens: int
    chat_packs: int
    answers: int
    answer_tokens: int
    tasks: list[Task]
    task_directories: list[str]
    task_limit: int | None
    apply_chat_template: bool
    batch_size: int


def eval_settings(config: Config, stage: str, downloaded: Mapping[str, str]) -> EvalSettings:
    """What defines the evaluation of <ckpt>/`stage`.

    Args:
        downloaded: the directories of data sets of the hub, by the `data` of the tasks that use them.
    """
    section = config.eval
    values = {key: getattr(section, key) for key in EvalSettings.model_fields if key != "stage"}
    values["tasks"] = [
        task.model_copy(update={"data": downloaded.get(task.data, task.data)}) if task.data else task
        for task in section.tasks
    ]
    return EvalSettings(stage=stage, **values)


def eval_run(config: Config) -> RunSettings:
    """How evaluations are run: their processes, and the nodes that trainings run on too."""
    section = config.eval
    return RunSettings(
        cluster=config.cluster,
        tracking="off",
        parallel=section.parallel,
        cpus_per_task=section.cpus_per_task,
        mem_gb_per_task=section.mem_gb_per_task,
    )
