"""The evaluation of a checkpoint as a job: what it is found by."""

from __future__ import annotations

from pathlib import Path

from snaketron.config import load
from snaketron.inference.evaluation import Evaluation
from snaketron.settings.evaluation import eval_run, eval_settings


def test_another_task_of_the_same_name_is_another_evaluation(publish, tmp_path: Path):
    """Else the results of the task that was there before would be published again."""
    publish("sft", "0a")
    task = tmp_path / "tasks/ours.yaml"
    task.parent.mkdir()

    def key(text: str) -> str:
        task.write_text(text)
        config = load({"eval": {"tasks": [{"name": "ours"}], "task_directories": [str(task.parent)]}}, {})
        settings = eval_settings(config, "sft", {})
        job = Evaluation(
            settings, eval_run(config), tmp_path / "ckpt/sft", [], None, tmp_path / "eval/sft.json"
        )
        assert [entry.path for entry in job.inputs if entry.name == "task"] == [str(task)]
        return job.key

    before = key("doc_to_target: a")
    assert key("doc_to_target: b") != before and key("doc_to_target: a") == before
