"""What the evaluation of a checkpoint is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from snaketron.config import Config, Section
from snaketron.config.evaluation import Task
from snaketron.settings import taken
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

    @property
    def task_files(self) -> list[str]:
        """The files that the tasks are made of, but those that a YAML file names elsewhere."""
        return files_below([*self.task_directories, *(task.data for task in self.tasks if task.data)])


def files_below(directories: Iterable[str]) -> list[str]:
    """All files of directories but hidden ones and what Python compiles, each once, in order."""
    found = {
        path
        for directory in map(Path, directories)
        for path in directory.rglob("*")
        if path.is_file()
        and not any(
            part.startswith(".") or part == "__pycache__" for part in path.relative_to(directory).parts
        )
    }
    return sorted(map(str, found))


def eval_settings(config: Config, stage: str, downloaded: Mapping[str, str]) -> EvalSettings:
    """What defines the evaluation of <ckpt>/`stage`.

    Args:
        downloaded: the directories of data sets of the hub, by the `data` of the tasks that use them.
    """
    tasks = [
        task.model_copy(update={"data": downloaded.get(task.data, task.data)}) if task.data else task
        for task in config.eval.tasks
    ]
    return taken(EvalSettings, config.eval, stage=stage, tasks=tasks)


def eval_run(config: Config) -> RunSettings:
    """How evaluations are run: their processes, and the nodes that trainings run on too."""
    return taken(RunSettings, config.eval, cluster=config.cluster, tracking="off")
