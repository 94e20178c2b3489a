"""What the rule of evaluations asks of the configuration."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from snaketron.config import ConfigError, load
from snaketron.graph.evaluation import EvaluationGraph, missing_tasks
from snaketron.settings.evaluation import EvalSettings
from snaketron.sources.lockfile import Lock

import pytest


def test_a_task_is_told_the_directory_that_its_data_is_downloaded_to(tmp_path: Path):
    config = load({"eval": {"tasks": [{"name": "mmlu", "data": "lab/quiz"}, {"name": "own"}]}}, {})
    lock = Lock(tmp_path / "lock.json", {})
    asked = EvaluationGraph(config, lock)
    with pytest.raises(ConfigError, match=r"eval\.tasks\[0\]\.data: lab/quiz is no directory here"):
        asked.settings(SimpleNamespace(stage="sft"))
    request = {"dataset": "lab/quiz", "revision": "main"}
    file = {"name": "one/test.parquet", "address": "", "size": 1, "sha256": "00"}
    lock.models["datasets/lab/quiz"] = {"request": request, "revision": "abc", "files": [file]}
    settings = json.loads(asked.settings(SimpleNamespace(stage="sft")))
    assert [task["data"] for task in settings["tasks"]] == ["data/hub/datasets/lab/quiz@abc", None]
    assert asked.task_data(None) == ["<data>/hub/datasets/lab/quiz@abc/one/test.parquet"]


def test_an_evaluation_is_made_of_the_files_of_its_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """But what Python compiles of them, and what a download notes, which say nothing of their content."""
    monkeypatch.chdir(tmp_path)
    for name in ("own/a.yaml", "own/utils.py", "quiz/one/test.parquet", "quiz/README.md"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("content")
    for name in ("own/__pycache__/utils.pyc", "quiz/.cache/lock"):
        Path(name).parent.mkdir()
        Path(name).write_text("content")
    tasks = [{"name": "a"}, {"name": "quiz", "data": "quiz"}, {"name": "quiz_2", "data": "quiz"}]
    config = load({"eval": {"tasks": tasks, "task_directories": ["own"]}}, {})
    graph = EvaluationGraph(config, Lock(tmp_path / "lock.json", {}))
    files = ["own/a.yaml", "own/utils.py", "quiz/README.md", "quiz/one/test.parquet"]
    assert graph.task_data(None) == files
    settings = EvalSettings.model_validate_json(graph.settings(SimpleNamespace(stage="sft")))
    assert settings.task_files == files
    Path("own/{a}.yaml").touch()
    with pytest.raises(ConfigError, match=r"eval\.tasks: 'own/\{a\}\.yaml' holds a brace"):
        graph.task_data(None)


def test_data_of_tasks_that_is_not_here_is_named_at_once(tmp_path: Path):
    """One has its data, one is given none, which may be in the cache of the hub."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "arc").mkdir()
    (tmp_path / "arc/README.md").write_text("---\n---\n")
    names = {"arc_easy": "arc", "mmlu": "none", "hellaswag": "empty"}
    tasks = [{"name": name, "data": str(tmp_path / of)} for name, of in names.items()]
    config = load({"eval": {"tasks": [*tasks, {"name": "winogrande"}], "task_directories": ["own"]}}, {})
    advice = "; download the data set on a machine with a network"
    assert list(missing_tasks(config.eval)) == [
        "eval.task_directories[0]: own is not there; name the directory of your own tasks",
        f"eval.tasks[1].data: {tmp_path / 'none'} of mmlu is not there{advice}",
        f"eval.tasks[2].data: {tmp_path / 'empty'} of hellaswag is empty{advice}",
    ]
