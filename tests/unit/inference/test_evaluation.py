"""The evaluation of a checkpoint as a job: what it is found by."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import snaketron.model  # noqa: F401  before megatron
from snaketron.config import load
from snaketron.inference.evaluation import Evaluation, evaluate
from snaketron.inference.score import score
from snaketron.jobs.heartbeat import INTERVAL_S
from snaketron.model.build import BuiltModel
from snaketron.settings.evaluation import eval_run, eval_settings

import pytest


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


def test_what_a_part_computes_is_a_sign_of_life(publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A part may take longer than `step_timeout`, after which the supervisor takes a job for hanging."""
    publish("sft", "0a")
    config = load({}, {})
    where = tmp_path / "ckpt/sft", [], None, tmp_path / "eval/sft.json"
    job = Evaluation(eval_settings(config, "sft", {}), eval_run(config), *where)
    beats, changed = job.version.heartbeat, []

    def part(built: BuiltModel) -> dict[str, int]:
        changed.append(beats.stat().st_mtime_ns)
        time.sleep(INTERVAL_S)
        score(built, [[1, 2, 3]])
        changed.append(beats.stat().st_mtime_ns)
        return {"tokens": 2}

    monkeypatch.setattr("snaketron.inference.evaluation.parts", lambda _: iter([("text/docs", part)]))
    # This process has joined itself already.
    monkeypatch.setattr("snaketron.model.distributed.distributed", lambda *_, **__: contextlib.nullcontext())
    assert evaluate(job) == 0
    assert changed[1] > changed[0]
