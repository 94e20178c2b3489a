"""What the rule of evaluations asks while Snakemake builds the graph."""

from __future__ import annotations

from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from snaketron.config import Config, ConfigError
from snaketron.config.evaluation import Evaluation
from snaketron.config.names import unusable
from snaketron.graph.training import cpus, requested
from snaketron.settings.evaluation import eval_run, eval_settings, files_below
from snaketron.sources.lockfile import Lock
from snaketron.sources.models import task_data


class EvaluationGraph:
    """Answers about the evaluation of a checkpoint, known by the wildcard `stage`."""

    def __init__(self, config: Config, lock: Lock) -> None:
        self.config, self.lock = config, lock

    def task_data(self, _wildcards: Any) -> list[str]:
        """The files of the tasks: of the hub, as they are downloaded, and of the user.

        `ConfigError` where the name of one cannot be used.
        """
        section, of_hub = self.config.eval, task_data(self.config)
        downloaded = [path for data in of_hub.values() for path in data.files(self.lock)]
        data = (task.data for task in section.tasks if task.data and task.data not in of_hub)
        files = files_below([*section.task_directories, *data])
        if problems := [problem for path in files if (problem := unusable(path))]:
            raise ConfigError("\n".join(f"eval.tasks: {problem}" for problem in problems))
        return [*downloaded, *files]

    def settings(self, wildcards: Any) -> str:
        """What defines the results; `ConfigError` where the data of a task is not here."""
        of_hub = task_data(self.config)
        if problems := list(missing_tasks(self.config.eval, of_hub)):
            raise ConfigError("\n".join(problems))
        root = self.config.pathvars["data"]
        downloaded = {name: f"{root}/hub/{data.place(self.lock)}" for name, data in of_hub.items()}
        return eval_settings(self.config, wildcards.stage, downloaded).model_dump_json()

    def resources(self) -> dict[str, Any]:
        """What it asks Slurm for, and how it is run. A change runs nothing again."""
        return requested(eval_run(self.config))

    def threads(self) -> int:
        return cpus(eval_run(self.config))


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
